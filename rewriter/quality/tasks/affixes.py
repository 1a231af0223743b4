"""Prefix-suffix lookup: neither word of a prefix alone says which string is meant."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from rewriter.quality.tasks.task import Question, Sample, Task
from rewriter.quality.tasks.words import WORDS

__all__ = ["Affixes"]


class Affixes(Task):
    """`(kabo zuni riva lemi, kabo temo gusa rave)? kabo temo` is answered by `gusa rave`."""

    name: ClassVar[str] = "affixes"
    summary: ClassVar[str] = "the second half of the string with a given first half"
    smallest: ClassVar[int] = 2

    def draw(self, rng: Random, size: int, num_questions: int) -> Sample:
        """About four strings share each first word, and four each second one; pairs are distinct."""
        count = max(2, size // 4)
        first, second = (rng.sample(WORDS, min(count, len(WORDS))) for _ in range(2))
        prefixes = _distinct_pairs(rng, first, second, size)
        strings = [(*prefix, rng.choice(WORDS), rng.choice(WORDS)) for prefix in prefixes]
        asked = rng.sample(strings, min(num_questions, len(strings)))
        questions = (Question(f"? {s[0]} {s[1]}", f"{s[2]} {s[3]}", (" ".join(s),)) for s in asked)
        return Sample(f"({', '.join(map(' '.join, strings))})", tuple(questions))


def _distinct_pairs(
    rng: Random, first: list[str], second: list[str], size: int
) -> list[tuple[str, str]]:
    pairs: dict[tuple[str, str], None] = {}
    while len(pairs) < min(size, len(first) * len(second)):
        pairs[rng.choice(first), rng.choice(second)] = None
    return list(pairs)
