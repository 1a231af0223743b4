"""Pointer tracking: each name leads to another, hop by hop; where do they end?"""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import ClassVar

from rewriter.quality.tasks.task import Question, Sample, Task
from rewriter.quality.tasks.words import WORDS

__all__ = ["Tracking"]

HOPS = (2, 3, 4)


class Tracking(Task):
    """`[kabo tudo, lemi kabo]? lemi` is answered by `kabo tudo; tudo`."""

    name: ClassVar[str] = "tracking"
    summary: ClassVar[str] = "the name at the end of 2 to 4 pointers"
    smallest: ClassVar[int] = 3

    def draw(self, rng: Random, size: int, num_questions: int) -> Sample:
        """Chains of `size` names in all, their pointers mixed; a name is in one chain, at one place."""
        chains = _chains(rng, rng.sample(WORDS, min(size, len(WORDS))))
        lines = [line for chain in chains for line in _lines(chain)]
        rng.shuffle(lines)
        asked = rng.sample(chains, min(num_questions, len(chains)))
        questions = (Question(f"? {c[0]}", f"{' '.join(c[1:])}; {c[-1]}", _lines(c)) for c in asked)
        return Sample(f"[{', '.join(lines)}]", tuple(questions))


def _lines(chain: list[str]) -> tuple[str, ...]:
    return tuple(f"{a} {b}" for a, b in pairwise(chain))


def _chains(rng: Random, names: list[str]) -> list[list[str]]:
    """The names cut into chains of a name more than hops; what is left over is dropped."""
    chains = []
    while len(names) > min(HOPS):
        length = min(rng.choice(HOPS) + 1, len(names))
        chains.append(names[:length])
        names = names[length:]
    return chains
