"""Texts as tokens of a model, and tasks at a length in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from random import Random
from typing import Any

from rewriter.errors import ConfigError, ModelError
from rewriter.quality.tasks import END, Sample, Task

__all__ = ["SLACK", "Encoding", "TokenSample", "size_for_length"]


SLACK = 8
"""Tokens a reply may be longer than the right answer."""

TRIALS = 3
"""Samples that are tried for a size."""


@dataclass(frozen=True)
class TokenSample:
    """A sample in tokens: the context with its beginning token, questions, right answers.

    Attributes:
        sample: what was encoded. context: at least one token. questions, answers: aligned.
        evidence: for each question, the positions of what its answer needs of the context.
    """

    sample: Sample
    context: list[int]
    questions: list[list[int]]
    answers: list[list[int]]
    evidence: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of the context with all questions and answers, and of a reply that is too long."""
        return len(self.context) + sum(map(len, (*self.questions, *self.answers))) + SLACK


class Encoding:
    """A tokenizer that fits a model.

    Args:
        tokenizer: of Hugging Face. vocab_size: rows of the model's embedding.

    Raises:
        ModelError: the tokenizer makes ids that the model does not have.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        if len(tokenizer) > vocab_size:
            raise ModelError(
                f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocab_size}: "
                "they do not belong together"
            )
        self.tokenizer = tokenizer
        self.bos: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, nothing added."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def text(self, ids: list[int]) -> str:
        """The text of tokens; the beginning and padding left out, the end token kept if it is END."""
        dropped = {self.tokenizer.bos_token_id, self.tokenizer.pad_token_id}
        if self.tokenizer.eos_token != END:
            dropped.add(self.tokenizer.eos_token_id)
        return self.tokenizer.decode([i for i in ids if i not in dropped])

    def encode(self, sample: Sample) -> TokenSample:
        """Context, questions and answers, each encoded by itself."""
        context = self.bos + self.ids(sample.context)
        questions = [self.ids(f" {q.prompt}") for q in sample.questions]
        answers = [self.ids(f" {q.answer}{END}") for q in sample.questions]
        if not context:  # a tokenizer without a beginning token, a task without a context
            context = self.ids(END)
        evidence = self._evidence(sample)
        return TokenSample(sample, context, questions, answers, evidence)

    def _evidence(self, sample: Sample) -> list[list[int]]:
        """Positions in the context, by question; none where the tokenizer does not tell offsets."""
        if not self.tokenizer.is_fast or not any(q.evidence for q in sample.questions):
            return [[] for _ in sample.questions]
        offsets = self.tokenizer(
            sample.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        found: list[list[int]] = []
        for question in sample.questions:
            starts = [(sample.context.index(text), len(text)) for text in question.evidence]
            spans = [(start, start + length) for start, length in starts]
            found.append(
                [
                    len(self.bos) + i
                    for i, (a, b) in enumerate(offsets)
                    if any(a < end and b > start for start, end in spans)
                ]
            )
        return found

    def check(self, task: Task) -> None:
        """Raises ModelError where the tokenizer does not know the words of a task."""
        encoded = self.encode(task.sample(Random(0), task.smallest, 4, held_out=True))
        ids = [*chain(encoded.context, *encoded.questions, *encoded.answers)]
        unknown = self.tokenizer.unk_token_id
        count = 0 if unknown is None else ids.count(unknown)
        if count:
            raise ModelError(
                f"the tokenizer does not know the words of {task.name}: {count} of {len(ids)} tokens "
                "are unknown to it"
            )


def size_for_length(task: Task, encoding: Encoding, length: int, num_questions: int) -> int:
    """The most entries with which samples of the task take at most `length` tokens, turns included.

    Samples of one size differ in length; the size is chosen on a few of them.

    Raises:
        ConfigError: not even the fewest entries fit.
    """

    def needed(size: int) -> int:
        rng = Random(size)
        drawn = (task.sample(rng, size, num_questions, held_out=True) for _ in range(TRIALS))
        return max(encoding.encode(sample).length for sample in drawn)

    smallest = task.smallest
    if needed(smallest) > length:
        allowed = f"at least about {needed(smallest)} tokens for {task.name}"
        raise ConfigError("length", length, allowed)
    low, high = smallest, 2 * smallest + 1
    while high < task.largest and needed(high) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= length else (low, middle)
    return min(low, task.largest)
