"""Prefix-suffix lookup: a string is known by its first half, and its second half is wanted."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from rewriter.quality.tasks.task import Question, Sample, Task
from rewriter.quality.tasks.words import WORDS

__all__ = ["Affixes"]


class Affixes(Task):
    """`(kabo zuni riva lemi, temo gusa rave duno)? kabo zuni` is answered by `riva lemi`."""

    name: ClassVar[str] = "affixes"
    summary: ClassVar[str] = "the second half of the string with a given first half"
    smallest: ClassVar[int] = 2
    largest: ClassVar[int] = len(WORDS) // 4

    def draw(self, rng: Random, size: int, num_questions: int) -> Sample:
        """No word comes twice in a context, so one match at a time leads through a string."""
        words = rng.sample(WORDS, 4 * min(size, self.largest))
        strings = [words[i : i + 4] for i in range(0, len(words), 4)]
        asked = rng.sample(strings, min(num_questions, len(strings)))
        questions = (
            Question(f"? {a} {b}", f"{c} {d}", (f"{a} {b} {c} {d}",)) for a, b, c, d in asked
        )
        return Sample(f"({', '.join(map(' '.join, strings))})", tuple(questions))
