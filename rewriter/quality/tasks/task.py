"""What a task is: contexts of any size with questions whose answers can be graded."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import ClassVar

__all__ = ["END", "ProblemTask", "Question", "Sample", "Task", "final_answer", "is_held_out"]

END = "\n"
"""Ends every answer."""

HELD_OUT = 8
"""One text in so many, by its hash, is never trained on."""


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        prompt: what is asked. answer: what a right reply says; its steps are separated by ";", and
            what follows the last one is graded. END is not part of it.
        evidence: the parts of the context, each unique in it, that the answer needs.
    """

    prompt: str
    answer: str
    evidence: tuple[str, ...] = ()

    @property
    def final(self) -> str:
        """The part that is graded."""
        return final_answer(self.answer)


@dataclass(frozen=True)
class Sample:
    """A context, and independent questions about it."""

    context: str
    questions: tuple[Question, ...]


class Task(ABC):
    """A family of samples. Those held out and the others are disjoint, by the hash of the problem."""

    name: ClassVar[str]
    summary: ClassVar[str]
    smallest: ClassVar[int] = 1
    largest: ClassVar[int] = 1024
    """Entries that a context may have."""

    @abstractmethod
    def draw(self, rng: Random, size: int, num_questions: int) -> Sample:
        """A context of `size` entries (pairs, statements) and questions about it."""

    def sample(self, rng: Random, size: int, num_questions: int, *, held_out: bool) -> Sample:
        """Like `draw`, on one side of the split."""
        while True:
            sample = self.draw(rng, size, num_questions)
            if is_held_out(sample.context) == held_out:
                return sample


class ProblemTask(Task):
    """Problems that stand alone; the context is solved examples."""

    smallest: ClassVar[int] = 0
    largest: ClassVar[int] = 4096

    @abstractmethod
    def problem(self, rng: Random) -> Question:
        """One problem with its solution."""

    def draw(self, rng: Random, size: int, num_questions: int) -> Sample:
        """`size` solved examples, and problems."""
        return self._assemble([self.problem(rng) for _ in range(size + num_questions)], size)

    def sample(self, rng: Random, size: int, num_questions: int, *, held_out: bool) -> Sample:
        """Every problem, the solved ones too, on one side of the split."""
        problems: list[Question] = []
        while len(problems) < size + num_questions:
            problem = self.problem(rng)
            if is_held_out(problem.prompt) == held_out:
                problems.append(problem)
        return self._assemble(problems, size)

    def _assemble(self, problems: list[Question], size: int) -> Sample:
        solved = "".join(f"{p.prompt} {p.answer}{END}" for p in problems[:size])
        return Sample(solved, tuple(problems[size:]))


def is_held_out(problem: str) -> bool:
    """Whether the hash of the text sets it apart for evaluation."""
    digest = hashlib.blake2b(problem.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0


def final_answer(text: str) -> str:
    """What is graded: after the last ";", before the end, with one spelling of spaces.

    A word-level tokenizer decodes 39 as "3 9", so spaces between digits do not count.
    """
    last = text.split(END)[0].split(";")[-1]
    return re.sub(r"(?<=\d) (?=\d)", "", " ".join(last.split())).strip(" .")
