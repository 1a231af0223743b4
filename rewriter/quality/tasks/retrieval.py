"""Key to value retrieval: the needle is one pair among many of the same look."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from rewriter.quality.tasks.task import Question, Sample, Task
from rewriter.quality.tasks.words import WORDS

__all__ = ["Retrieval"]


class Retrieval(Task):
    """`{kabo lemi, tudo rave}? tudo` is answered by `rave`."""

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "the value of a key among pairs"

    def draw(self, rng: Random, size: int, num_questions: int) -> Sample:
        """Keys are distinct; questions are about distinct keys while there are enough."""
        keys = rng.sample(WORDS, min(size, len(WORDS)))
        pairs = [(key, rng.choice(WORDS)) for key in keys]
        asked = rng.sample(pairs, min(num_questions, len(pairs)))
        text = ", ".join(f"{key} {value}" for key, value in pairs)
        questions = (Question(f"? {k}", v, (f"{k} {v}",)) for k, v in asked)
        return Sample(f"{{{text}}}", tuple(questions))
