"""Prefix-suffix lookup: neither end of a string alone says which one is meant."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from rewriter.quality.tasks.task import Question, Sample, Task
from rewriter.quality.tasks.words import WORDS

__all__ = ["Affixes"]


class Affixes(Task):
    """`(kabo zuni riva lemi, kabo temo gusa rave)? kabo rave` is answered by `temo gusa`."""

    name: ClassVar[str] = "affixes"
    summary: ClassVar[str] = "the middle of the string with a given first and last word"
    smallest: ClassVar[int] = 2

    def draw(self, rng: Random, size: int, num_questions: int) -> Sample:
        """About four strings share each first word, and four each last one; pairs are distinct."""
        count = max(2, size // 4)
        first, last = (rng.sample(WORDS, min(count, len(WORDS))) for _ in range(2))
        ends = _distinct_pairs(rng, first, last, size)
        strings = [(p, rng.choice(WORDS), rng.choice(WORDS), s) for p, s in ends]
        asked = rng.sample(strings, min(num_questions, len(strings)))
        questions = (Question(f"? {s[0]} {s[3]}", f"{s[1]} {s[2]}", (" ".join(s),)) for s in asked)
        return Sample(f"({', '.join(map(' '.join, strings))})", tuple(questions))


def _distinct_pairs(
    rng: Random, first: list[str], last: list[str], size: int
) -> list[tuple[str, str]]:
    pairs: dict[tuple[str, str], None] = {}
    while len(pairs) < min(size, len(first) * len(last)):
        pairs[rng.choice(first), rng.choice(last)] = None
    return list(pairs)
