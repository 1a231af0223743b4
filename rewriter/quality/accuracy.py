"""Accuracy on tasks, in the two ways a cached context is used.

`multi-request`: the context is encoded once, blind to the questions, and each question is asked of a copy
of that state. `multi-turn`: questions follow one another in one session; after each reply the right answer
is put in its place, so that an early mistake does not spoil what follows.
Source of the modes: https://arxiv.org/abs/2412.10319
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import torch

from rewriter.decoding.state import Session
from rewriter.optimized import OptimizedModel
from rewriter.quality.decode import continue_greedily, feed
from rewriter.quality.encoding import SLACK, Encoding, TokenSample, size_for_length
from rewriter.quality.tasks import END, TASKS, final_answer

__all__ = ["MODES", "Grades", "draw_samples", "grade"]

MOST_ROWS = 32
"""Samples that are answered together."""

MODES = ("multi-request", "multi-turn")


@dataclass(frozen=True)
class Grades:
    """What became of the questions, [samples][questions].

    Attributes:
        right: 1 or 0. held: share of layers and heads that still held all that the answer needs of the
            context when it was asked; None where that is not known.
        state_bytes: of one row, at the end.
    """

    right: list[list[float]]
    held: list[list[float | None]]
    state_bytes: int


def draw_samples(
    task: str, encoding: Encoding, length: int, count: int, num_questions: int, seed: int
) -> list[TokenSample]:
    """Held-out samples of a task that fill `length` tokens, turns included.

    The same for the same seed. Raises ConfigError for a length that is too short.
    """
    rng, kind = Random(seed), TASKS[task]
    size = size_for_length(kind, encoding, length, num_questions)
    drawn: list[TokenSample] = []
    while len(drawn) < count:
        sample = encoding.encode(kind.sample(rng, size, num_questions, held_out=True))
        if sample.length <= length:
            drawn.append(sample)
    return drawn


def grade(
    model: OptimizedModel, encoding: Encoding, samples: Sequence[TokenSample], modes: Sequence[str]
) -> dict[str, Grades]:
    """Ask every question in each mode; only what a reply ends with is graded.

    Args:
        samples: with the same number of questions; up to `MOST_ROWS` of them share a session.
        modes: of `MODES`. The contexts are read once for all.
    """
    parts: dict[str, list[Grades]] = {mode: [] for mode in modes}
    for start in range(0, len(samples), MOST_ROWS):
        rows = samples[start : start + MOST_ROWS]
        context = model.session(len(rows))
        feed(context, [sample.context for sample in rows])
        for mode in modes:
            parts[mode].append(_grade(context.fork(), encoding, rows, mode))
    return {mode: _joined(found) for mode, found in parts.items()}


def _joined(parts: Sequence[Grades]) -> Grades:
    return Grades(
        [row for part in parts for row in part.right],
        [row for part in parts for row in part.held],
        max(part.state_bytes for part in parts),
    )


def _grade(
    session: Session, encoding: Encoding, samples: Sequence[TokenSample], mode: str
) -> Grades:
    """Of samples whose contexts the session has read."""
    ends = _ends(encoding)
    right: list[list[float]] = [[] for _ in samples]
    held: list[list[float | None]] = [[] for _ in samples]
    asked = session
    for turn in range(len(samples[0].questions)):
        questions = [sample.questions[turn] for sample in samples]
        answers = [sample.answers[turn] for sample in samples]
        asked = session.fork()
        limit = max(map(len, answers)) + SLACK
        logits = feed(asked, questions)
        for row, share in enumerate(_held(asked, [sample.evidence[turn] for sample in samples])):
            held[row].append(share)
        replies = continue_greedily(asked, logits, limit, ends)
        for row, reply in enumerate(replies):
            expected = samples[row].sample.questions[turn].final
            text = encoding.text(reply[: len(answers[row]) + SLACK])
            right[row].append(float(final_answer(text) == expected))
        if mode == "multi-turn":
            turns = zip(questions, answers, strict=True)
            feed(session, [question + answer for question, answer in turns])
    return Grades(right, held, asked.state_bytes() // len(samples))


def _held(session: Session, evidence: Sequence[list[int]]) -> list[float | None]:
    """For each row, the share of layers and heads that still hold all of its positions."""
    caches = session.kept_positions().values()
    shares: list[float | None] = []
    for row, positions in enumerate(evidence):
        heads = [cache[row].reshape(-1, cache.shape[-1]) for cache in caches]
        wanted = torch.tensor(positions).view(-1, 1, 1)
        whole = [(head == wanted).any(-1).all(0).float() for head in heads]
        share = float(torch.cat(whole).mean()) if whole else 1.0
        shares.append(share if positions else None)
    return shares


def _ends(encoding: Encoding) -> Callable[[int], bool]:
    """Whether a token ends an answer."""

    @cache
    def ends(token: int) -> bool:
        return token == encoding.tokenizer.eos_token_id or END in encoding.text([token])

    return ends
