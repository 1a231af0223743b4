"""Accuracy on tasks, in the two ways a cached context is used.

`multi-request`: the context is encoded once, blind to the questions, and each question is asked of a copy
of that state. `multi-turn`: questions follow one another in one session; after each reply the right answer
is put in its place, so that an early mistake does not spoil what follows.
Source of the modes: https://arxiv.org/abs/2412.10319
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from random import Random

from rewriter.decoding.state import Session
from rewriter.optimized import OptimizedModel
from rewriter.quality.decode import continue_greedily, feed
from rewriter.quality.encoding import Encoding, TokenSample
from rewriter.quality.tasks import END, TASKS, final_answer

__all__ = ["MODES", "draw_samples", "grade"]

SLACK = 8
"""Tokens a reply may be longer than the right answer."""

MODES = ("multi-request", "multi-turn")


def draw_samples(
    task: str, encoding: Encoding, size: int, count: int, num_questions: int, seed: int
) -> list[TokenSample]:
    """Held-out samples of a task, the same for the same seed."""
    rng = Random(seed)
    kind = TASKS[task]
    drawn = (kind.sample(rng, size, num_questions, held_out=True) for _ in range(count))
    return [encoding.encode(sample) for sample in drawn]


def grade(
    model: OptimizedModel,
    encoding: Encoding,
    samples: Sequence[TokenSample],
    mode: str,
    on_progress: Callable[[float], None] | None = None,
) -> list[list[float]]:
    """1 or 0 for each question of each sample; only what the reply ends with is graded."""
    ask = _all_at_once if mode == "multi-request" else _in_turns
    ends = _ends(encoding)
    grades = []
    for index, sample in enumerate(samples):
        session = model.session(1)
        feed(session, [sample.context])
        replies = ask(session, sample, ends)
        pairs = zip(replies, sample.sample.questions, strict=True)
        grades.append([float(final_answer(encoding.text(r)) == q.final) for r, q in pairs])
        if on_progress is not None:
            on_progress((index + 1) / len(samples))
    return grades


def _all_at_once(
    session: Session, sample: TokenSample, ends: Callable[[int], bool]
) -> list[list[int]]:
    """Each question of a copy of the state."""
    copies = session.fork(len(sample.questions))
    logits = feed(copies, sample.questions)
    limit = max(map(len, sample.answers)) + SLACK
    return continue_greedily(copies, logits, limit, ends)


def _in_turns(
    session: Session, sample: TokenSample, ends: Callable[[int], bool]
) -> list[list[int]]:
    """Replies are made on a copy; the session itself hears the right answers."""
    replies = []
    for question, answer in zip(sample.questions, sample.answers, strict=True):
        logits = feed(session, [question])
        replies += continue_greedily(session.fork(), logits, len(answer) + SLACK, ends)
        feed(session, [answer])
    return replies


def _ends(encoding: Encoding) -> Callable[[int], bool]:
    """Whether a token ends an answer."""

    @cache
    def ends(token: int) -> bool:
        return token == encoding.tokenizer.eos_token_id or END in encoding.text([token])

    return ends
