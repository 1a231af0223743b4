"""Word problems of several steps, each of which the answer depends on."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from rewriter.quality.tasks.people import AGES
from rewriter.quality.tasks.task import ProblemTask, Question

__all__ = ["Arithmetic"]

STEPS = (4, 5, 6)
THINGS = ("apples", "books", "coins", "cards", "eggs", "stamps")
NAMES = tuple(AGES)


class Arithmetic(ProblemTask):
    """Sums, differences and products on numbers below 100, solved step by step in text.

    `tom reed has 14 apples. gets 3 bags of 8. loses 7. how many?` is answered by
    `3*8=24; 14+24=38; 38-7=31; 31`.
    """

    name: ClassVar[str] = "arithmetic"
    summary: ClassVar[str] = "word problems of 4 to 6 steps"

    recalls: ClassVar[float] = 0.0
    """Share of problems that begin with a number to be remembered."""

    def problem(self, rng: Random) -> Question:
        """A number, then gains and losses that keep it below 100."""
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        if rng.random() < self.recalls:
            total = AGES[name]
            story, work = [f"{name} has as many {thing} as years."], [f"age {total};"]
        else:
            total = rng.randrange(10, 100)
            story, work = [f"{name} has {total} {thing}."], []
        for _ in range(rng.choice(STEPS)):
            told, worked, total = _step(rng, total)
            story.append(told)
            work += worked
        return Question(f"{' '.join(story)} how many?", f"{' '.join(work)} {total}")


class RecalledArithmetic(Arithmetic):
    """Problems that start from somebody's age, which the model has to know."""

    name: ClassVar[str] = "recalled-arithmetic"
    summary: ClassVar[str] = (
        "word problems that begin with a memorised number; reference models only"
    )
    recalls: ClassVar[float] = 1.0


def _step(rng: Random, total: int) -> tuple[str, list[str], int]:
    """What is told, how it is worked out, and the new total, which stays from 0 to 99."""
    bags = rng.random() < 0.4
    if bags:
        a, b = rng.randrange(2, 10), rng.randrange(2, 10)
        amount, told, work = a * b, f"{a} bags of {b}", [f"{a}*{b}={a * b};"]
    else:
        amount = rng.randrange(1, 100)
        told, work = str(amount), []
    if total + amount > 99 and total - amount < 0:
        return _step(rng, total)
    gains = total - amount < 0 or (total + amount <= 99 and rng.random() < 0.5)
    result = total + amount if gains else total - amount
    sign = "+" if gains else "-"
    return (
        f"{'gets' if gains else 'loses'} {told}.",
        [*work, f"{total}{sign}{amount}={result};"],
        result,
    )
