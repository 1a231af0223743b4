"""Prefix-suffix lookup: a string is known by its first two words, and its last is wanted."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from rewriter.quality.tasks.task import Question, Sample, Task
from rewriter.quality.tasks.words import WORDS

__all__ = ["Affixes"]


class Affixes(Task):
    """`(kabo zuni riva, temo gusa rave)? kabo zuni` is answered by `riva`."""

    name: ClassVar[str] = "affixes"
    summary: ClassVar[str] = "the last word of the string that begins with two given ones"
    smallest: ClassVar[int] = 2
    largest: ClassVar[int] = len(WORDS) // 3

    def draw(self, rng: Random, size: int, num_questions: int) -> Sample:
        """No word comes twice in a context: one of the two words would do to find the string."""
        words = rng.sample(WORDS, 3 * min(size, self.largest))
        strings = [words[i : i + 3] for i in range(0, len(words), 3)]
        asked = rng.sample(strings, min(num_questions, len(strings)))
        questions = (Question(f"? {a} {b}", c, (f"{a} {b} {c}",)) for a, b, c in asked)
        return Sample(f"({', '.join(map(' '.join, strings))})", tuple(questions))
