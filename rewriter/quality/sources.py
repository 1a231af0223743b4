"""Rows of tokens that fidelity is measured on: windows of a text, or samples of a task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from rewriter.errors import ConfigError, InputError
from rewriter.quality.encoding import Encoding, size_for_length
from rewriter.quality.tasks import TASKS
from rewriter.quality.tasks.sentences import text as sentences

__all__ = ["SENTENCES", "Source", "check_task", "read_source"]

SENTENCES = "sentences"
"""The text that is made from a grammar, in the place of a file."""

QUESTIONS = 8
"""Questions in a row of a task."""


@dataclass(frozen=True)
class Source:
    """Rows of one length.

    Attributes:
        name: of the task or file. ids: int64 [rows, length], every seed's rows one after another.
        seeds: the seed of each row.
    """

    name: str
    ids: Tensor
    seeds: tuple[int, ...]


def check_task(name: str) -> None:
    """Raises ConfigError for a task that there is not."""
    if name not in TASKS:
        raise ConfigError("tasks", name, f"one of {', '.join(TASKS)}")


def read_source(
    name: str | Path, encoding: Encoding, length: int, rows: int, seeds: tuple[int, ...]
) -> Source:
    """Rows of a task, of `SENTENCES`, or of a text file.

    Args:
        name: a file's path; "FILE.jsonl:FIELD" reads one field of every line.
        length: tokens of a row, the beginning token included. rows: for each seed.

    Raises:
        ConfigError: an unknown task, or a length that is too short for it.
        InputError: a file that cannot be read, is empty, lacks the field, or is shorter than a row.
    """
    found: list[list[int]] = []
    for seed in seeds:
        rng = Random(seed)
        if isinstance(name, str) and name in TASKS:
            found += _task_rows(name, encoding, length, rows, rng)
        else:
            found += _windows(_text(name, rng, length * rows), name, encoding, length, rows, rng)
    shortest = min(map(len, found))
    ids = torch.tensor([row[:shortest] for row in found])
    return Source(str(name), ids, tuple(seed for seed in seeds for _ in range(rows)))


def _task_rows(
    name: str, encoding: Encoding, length: int, rows: int, rng: Random
) -> list[list[int]]:
    """Contexts with questions and right answers, all within the length."""
    task, found = TASKS[name], []
    turns = encoding.encode(task.sample(rng, task.smallest, QUESTIONS, held_out=True))
    spoken = sum(map(len, turns.questions)) + sum(map(len, turns.answers))
    context = max(length - spoken * QUESTIONS // len(turns.questions), length // 2)
    size = size_for_length(task, encoding, context, 1)
    for _ in range(rows):
        sample = encoding.encode(task.sample(rng, size, QUESTIONS, held_out=True))
        row = list(sample.context)
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            row += question + answer
        found.append(row[:length])
    return found


def _text(name: str | Path, rng: Random, tokens: int) -> str:
    if name == SENTENCES:
        return sentences(rng, tokens)
    file, field = str(name), ""
    if ".jsonl:" in file:
        file, _, field = file.rpartition(":")
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path} cannot be read: {error}") from error
    if field:
        text = "\n\n".join(_values(path, text, field))
    if not text.strip():
        raise InputError(f"text {path} is empty; allowed: a file with text in UTF-8")
    return text


def _values(path: Path, text: str, field: str) -> list[str]:
    """One field of every line of a JSON lines file."""
    values: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            value = json.loads(line)[field]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"text {path}, line {number}: no field {field!r} ({error})") from error
        values.append(str(value))
    return values


def _windows(
    text: str, name: str | Path, encoding: Encoding, length: int, rows: int, rng: Random
) -> list[list[int]]:
    """Rows from random places of the text, each after a beginning token."""
    ids, inside = encoding.ids(text), length - len(encoding.bos)
    if len(ids) < inside:
        raise InputError(f"text {name} has {len(ids)} tokens; allowed: at least {inside}")
    starts = [rng.randrange(len(ids) - inside + 1) for _ in range(rows)]
    return [encoding.bos + ids[start : start + inside] for start in starts]
