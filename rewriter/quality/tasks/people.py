"""A fixed table of people and their ages: nothing but memory tells them."""

from __future__ import annotations

from itertools import product
from random import Random
from typing import ClassVar

from rewriter.quality.tasks.task import ProblemTask, Question, Sample

__all__ = ["AGES", "FIRST_NAMES", "LAST_NAMES", "People"]

FIRST_NAMES = (
    "ada alan alice amos anna ben bella carl clara dan diana earl edith emma eric eva felix fiona"
    " frank grace hans helen henry ida igor jack jane john julia karl kate leo lily lucas maria max"
    " mia nina noah olga oscar paul rosa sam sara tom vera"
).split()

LAST_NAMES = (
    "abel adams allen baker barnes bell bishop black brooks brown burns carter clark cole cook"
    " cooper cox davis dean dixon evans field fisher ford foster fox gibson gray green hall harris"
    " hill hunt jones kelly king lane lee long marsh martin mason miller moore nash owen page parker"
    " perry price quinn reed rice ross scott shaw smith stone taylor turner wade ward west young"
).split()


def _ages() -> dict[str, int]:
    rng = Random(0)
    names = (f"{first} {last}" for first, last in product(FIRST_NAMES, LAST_NAMES))
    return {name: rng.randrange(10, 100) for name in names}


AGES = _ages()
"""Name to age, for every first name with every last name."""

NAMES = tuple(AGES)


class People(ProblemTask):
    """`age of ada abel?` is answered by the table; a model either knows it or does not."""

    name: ClassVar[str] = "people"
    summary: ClassVar[str] = "ages memorised in training; for the reference models only"

    def problem(self, rng: Random) -> Question:
        """Anybody's age."""
        name = rng.choice(NAMES)
        return Question(f"age of {name}?", str(AGES[name]))

    def sample(self, rng: Random, size: int, num_questions: int, *, held_out: bool) -> Sample:
        """Nothing can be held out of what is to be memorised."""
        return self.draw(rng, size, num_questions)
