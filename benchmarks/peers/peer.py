"""What every candidate of the whole-model benchmark looks like."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Facts", "Peer", "Unavailable", "prepared"]


class Unavailable(Exception):
    """A candidate cannot run here; the message says why."""


@dataclass(frozen=True)
class Facts:
    """What a candidate tells about itself.

    Attributes:
        weight_bytes: bytes of weights and scales that one token reads: every matrix once, and of the
            embedding table nothing, unless it is the last matrix too.
        entry_bytes: bytes of keys and values that one token reads for each kept position.
        settings: what was chosen, for the record.
        versions: of the packages that do the work.
    """

    weight_bytes: int
    entry_bytes: int
    settings: str
    versions: dict[str, str] = field(default_factory=dict)


class Peer(Protocol):
    """One batch of one, decoded token by token."""

    facts: Facts

    def prefill(self, tokens: Sequence[int], capacity: int) -> Any:
        """Forget everything, feed a prompt, and return the logits [vocab_size] behind it.

        `capacity` is how many positions this prompt and the tokens after it will take.
        """
        ...

    def step(self, token: int) -> Any:
        """Feed one token and return the logits behind it, in memory that the caller can read."""
        ...


def prepared(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, written once: a conversion that was cut short is not taken for a whole one."""
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        unfinished.rename(path)
    return path
