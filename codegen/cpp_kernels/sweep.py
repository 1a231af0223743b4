"""How kernels on the CPU read the rows of a matrix: what `gemv.h` leaves to be tuned."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from rewriter.errors import ConfigError

__all__ = ["DEFAULT", "SweepConfig", "candidates", "least_seconds"]


@dataclass(frozen=True)
class SweepConfig:
    """Knobs of `rw::sweep_rows`.

    Attributes:
        rows: read side by side at most: 1, 2, 4 or 8.
        ahead_bytes: asked for early, of all rows of a block together; a multiple of 512.
        threads: 0 for all that the call may use.

    Raises:
        ConfigError: another value.
    """

    rows: int = 8
    ahead_bytes: int = 4096
    threads: int = 0

    def __post_init__(self) -> None:
        if self.rows not in (1, 2, 4, 8):
            raise ConfigError("rows", self.rows, "1, 2, 4 or 8")
        if self.ahead_bytes < 0 or self.ahead_bytes % 512:
            raise ConfigError("ahead_bytes", self.ahead_bytes, "a multiple of 512")
        if self.threads < 0:
            raise ConfigError("threads", self.threads, "0 for all, or their number")

    def defines(self) -> str:
        """What stands before the text of a kernel; nothing for values that `gemv.h` has."""
        lines = [
            f"#define RW_MOST_ROWS {self.rows}\n" * (self.rows != DEFAULT_ROWS),
            f"#define RW_AHEAD_BYTES {self.ahead_bytes}\n" * (self.ahead_bytes != DEFAULT_AHEAD),
        ]
        return "".join(lines)


DEFAULT_ROWS, DEFAULT_AHEAD = 8, 4096
DEFAULT = SweepConfig()


def candidates(threads: int) -> tuple[SweepConfig, ...]:
    """All that are worth measuring where a call may use so many threads."""
    numbers = (0,) if threads <= 1 else (0, 1)
    space = itertools.product((1, 2, 4, 8), (0, 1024, 4096, 16384), numbers)
    return tuple(SweepConfig(*knobs) for knobs in space)


def least_seconds(call: Callable[[], object], budget_s: float = 0.01) -> float:
    """The least wall seconds of one call, of at least five and of as many as fit into the budget."""
    least, spent, runs = float("inf"), 0.0, 0
    while runs < 6 or spent < budget_s:
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        least = min(least, taken) if runs else least  # the first one finds cold caches
        spent, runs = spent + taken, runs + 1
    return least
