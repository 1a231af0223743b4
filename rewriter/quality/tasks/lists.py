"""Order statistics: the largest, smallest or middle number of a list, by sorting it first."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from rewriter.quality.tasks.task import ProblemTask, Question

__all__ = ["Lists"]

LENGTHS = (5, 7, 9)


class Lists(ProblemTask):
    """`median of 57 14 93?` is answered by `sorted 14 57 93; 57`."""

    name: ClassVar[str] = "lists"
    summary: ClassVar[str] = "max, min or median of 5 to 9 numbers"

    def problem(self, rng: Random) -> Question:
        """Distinct numbers of two digits."""
        numbers = rng.sample(range(10, 100), rng.choice(LENGTHS))
        ordered = sorted(numbers)
        wanted = rng.choice(("max", "min", "median"))
        index = {"max": -1, "min": 0, "median": len(ordered) // 2}[wanted]
        prompt = f"{wanted} of {' '.join(map(str, numbers))}?"
        return Question(prompt, f"sorted {' '.join(map(str, ordered))}; {ordered[index]}")
