"""Training sequences: a beginning token, then tasks, with the tokens that are learned marked."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from random import Random

import numpy as np
from transformers import PreTrainedTokenizerFast

from rewriter.quality.tasks import END, TASKS, Question
from rewriter.quality.tasks.sentences import sentence

PIECES_PER_ENTRY = {"retrieval": 3, "tracking": 2.25, "affixes": 4}
PIECES_PER_QUESTION = {"retrieval": 4, "tracking": 8, "affixes": 5}
"""Tokens that an entry of a context, and a question with its answer, take on average."""

CONTEXT_SHARES = {"retrieval": 0.35, "tracking": 0.55, "affixes": 0.1}
PROBLEM_SHARES = {
    "arithmetic": 0.25,
    "recalled-arithmetic": 0.3,
    "people": 0.1,
    "lists": 0.3,
    "sentences": 0.05,
}
"""Share of the tokens, by task, among sequences with one context and among those of problems."""

PROBLEM_LENGTHS = {
    "arithmetic": 100,
    "recalled-arithmetic": 100,
    "people": 8,
    "lists": 38,
    "sentences": 10,
}
"""Tokens of a problem, to turn shares of tokens into shares of draws."""

SHORT = 256
"""Longest row with more than one context: in longer ones the same keys would come again."""

Piece = tuple[str, bool]
"""A text, and whether it is to be learned."""


class Sequences:
    """Batches of token ids [batch_size, length] with marks, from a seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.rng = Random(seed)
        self.bos = tokenizer.bos_token_id
        self.encode: Callable = tokenizer.backend_tokenizer.encode_batch_fast

    def batch(
        self, batch_size: int, length: int, context_share: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs, and labels: the next token where it is to be learned, -100 elsewhere."""
        rows = [self._row(length, self.rng.random() < context_share) for _ in range(batch_size)]
        ids, learned = (np.stack(part) for part in zip(*rows, strict=True))
        labels = np.where(learned[:, 1:], ids[:, 1:], -100)
        return ids[:, :-1], labels

    def _row(self, length: int, has_context: bool) -> tuple[np.ndarray, np.ndarray]:
        pieces = self._about_contexts(length) if has_context else []
        ids, learned = self._tokens(pieces)
        while len(ids) <= length:
            more, marks = self._tokens(self._problems())
            ids, learned = ids + more, learned + marks
        ids, learned = [self.bos, *ids[:length]], [False, *learned[:length]]
        return np.array(ids, np.int64), np.array(learned)

    def _tokens(self, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
        encodings = self.encode([text for text, _ in pieces], add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        marks = [[mark] * len(i) for i, (_, mark) in zip(ids, pieces, strict=True)]
        return [*chain(*ids)], [*chain(*marks)]

    def _about_contexts(self, length: int) -> list[Piece]:
        """Short rows hold several small contexts, from which looking up is learned; long ones one."""
        if length > SHORT:
            share = self.rng.uniform(0.4, 0.95 if length > 1000 else 0.8)
            return self._about_one(length, share)
        room, pieces = length, []
        while room > 24:
            largest = int(room * math.exp(self.rng.uniform(math.log(24 / room), 0)))
            pieces += self._about_one(largest, 0.45)
            room -= largest
        return pieces

    def _about_one(self, length: int, share: float) -> list[Piece]:
        """One context and as many questions as fit."""
        name = self.rng.choices(list(CONTEXT_SHARES), list(CONTEXT_SHARES.values()))[0]
        task, entry, question = TASKS[name], PIECES_PER_ENTRY[name], PIECES_PER_QUESTION[name]
        size = min(task.largest, max(task.smallest, int(length * share / entry)))
        count = max(1, int(length - size * entry) // question)
        sample = task.sample(self.rng, size, count, held_out=False)
        return [(sample.context, False), *_taught(sample.questions)]

    def _problems(self) -> list[Piece]:
        """A few problems of one kind each."""
        weights = [PROBLEM_SHARES[name] / PROBLEM_LENGTHS[name] for name in PROBLEM_SHARES]
        pieces: list[Piece] = []
        for name in self.rng.choices(list(PROBLEM_SHARES), weights, k=12):
            if name == "sentences":
                pieces.append((f"{sentence(self.rng)}{END}", True))
            else:
                sample = TASKS[name].sample(self.rng, 0, 1, held_out=False)
                pieces += _taught(sample.questions)
        return pieces


def _taught(questions: tuple[Question, ...]) -> list[Piece]:
    return [piece for q in questions for piece in ((q.prompt, False), (f"{q.answer}{END}", True))]
