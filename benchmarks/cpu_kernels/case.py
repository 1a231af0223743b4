"""What one comparison of kernels is, how it is checked, and how it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timing import Samples, timed
from torch import Tensor

from cpu_kernels.read import read_candidates

__all__ = ["Candidate", "Case", "Measured", "WrongNumbers", "measure"]


class WrongNumbers(Exception):
    """A candidate's result is not the reference's."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case's result.

    Attributes:
        call: returns the result; a tensor that later calls do not change.
        bytes_moved: what it has to read and write.
        expected: what the result must be; the case's unless given.
        warm: a tiny call by the same way, before each one that is timed. Python's and PyTorch's own
            code is out of the caches after some megabytes of weights, and costs 0.3 ms to fetch again; a
            generated step does not run it.
    """

    name: str
    call: Callable[[], Tensor]
    bytes_moved: float
    expected: Tensor | None = None
    warm: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """Candidates that are compared on one machine, in one run, in turns.

    Attributes:
        kernel: the section, as in `--only`.
        name: shape and dtype.
        expected: what every candidate's result must be.
        tolerance: largest |difference| over the largest |expected|.
        buffer: contiguous and of about as many bytes as are moved; reading it gives the bandwidth.
        target: share of the bandwidth that the first candidate has to reach; 0 for none.
    """

    kernel: str
    name: str
    candidates: Sequence[Candidate]
    expected: Tensor
    tolerance: float
    buffer: Tensor
    target: float = 0.0


@dataclass
class Measured:
    """Times of a case's candidates and the bandwidth of plain reading beside them.

    Bandwidths and ratios are of least times, on both sides: what else runs on the machine falls on one
    or the other by chance. The medians stand beside them.
    """

    case: Case
    read_gb_s: float
    read_by: str
    samples: list[Samples] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def gb_s(self, index: int) -> float:
        """Bytes moved over the least time."""
        return self.case.candidates[index].bytes_moved / self.samples[index].least / 1e6

    @property
    def met(self) -> bool:
        """Whether the first candidate reached the target."""
        return self.gb_s(0) >= self.case.target * self.read_gb_s

    def as_dict(self) -> dict[str, Any]:
        """For the results' file."""
        rows = {
            c.name: {
                **self.samples[i].as_dict(),
                "bytes_moved": c.bytes_moved,
                "gb_s": round(self.gb_s(i), 2),
                "of_read": round(self.gb_s(i) / self.read_gb_s, 3),
                "of_first": round(self.samples[i].least / self.samples[0].least, 3),
                "error": self.errors[i],
            }
            for i, c in enumerate(self.case.candidates)
        }
        told = {"kernel": self.case.kernel, "case": self.case.name, "target": self.case.target}
        read = {"read_gb_s": round(self.read_gb_s, 2), "read_by": self.read_by}
        return {**told, **read, "candidates": rows}


def measure(case: Case, rounds: int, threads: int) -> Measured:
    """Check every candidate, then time all of them and plain reading in turns: A, B, C, A, B, C, ...

    Raises:
        WrongNumbers: before anything is timed.
    """
    errors = [_error(case, candidate) for candidate in case.candidates]
    readers = read_candidates(case.buffer, threads)
    calls = [*readers.values(), *(c.call for c in case.candidates)]
    warms = [*(None for _ in readers), *(c.warm for c in case.candidates)]
    samples = [Samples(name) for name in (*readers, *(c.name for c in case.candidates))]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, warm, sample in zip(calls, warms, samples, strict=True):
            if warm is not None:
                warm()
            sample.ms.append(timed(call)[1])
    best = min(samples[: len(readers)], key=lambda s: s.least)
    read_gb_s = case.buffer.nbytes / best.least / 1e6
    return Measured(case, read_gb_s, best.name, samples[len(readers) :], errors)


def _error(case: Case, candidate: Candidate) -> float:
    expected = case.expected if candidate.expected is None else candidate.expected
    difference = (candidate.call().double() - expected.double()).abs().max()
    error = (difference / expected.double().abs().max().clamp_min(torch.finfo().tiny)).item()
    if not error <= case.tolerance:
        raise WrongNumbers(f"{case.kernel} {case.name}: {candidate.name} differs by {error:.1e}")
    return error
