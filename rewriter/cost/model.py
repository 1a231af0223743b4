"""What a cost model answers, and what two answers say about a rewrite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rewriter.cost.work import Work

__all__ = ["CostModel", "Estimate", "Prediction", "compare", "estimate_all", "total_prediction"]


@dataclass(frozen=True)
class Estimate:
    """A time and the interval it is in nine times of ten.

    Attributes:
        seconds, low, high: low <= seconds <= high.
        unsure: why the model does not stand by it, or "".
    """

    seconds: float
    low: float
    high: float
    unsure: str = ""

    def __add__(self, other: Estimate) -> Estimate:
        """Of both, one after the other; as if both erred the same way."""
        return Estimate(
            self.seconds + other.seconds,
            self.low + other.low,
            self.high + other.high,
            self.unsure or other.unsure,
        )


class CostModel(Protocol):
    """How long work takes on this machine. Asked often: an answer measures and compiles nothing."""

    name: str

    def estimate(self, work: Work, backend: str) -> Estimate:
        """Of one call on a backend of `optimize`; unsure where nothing like it is known."""
        ...


@dataclass(frozen=True)
class Prediction:
    """A rewrite's time before and after.

    Attributes:
        model: name of who predicted. backend: what the times are for.
        before, after: of one decode step at the site.
        low, high: interval of after / before, as if the two erred independently.
        unsure: why it decides nothing, or "".
    """

    model: str
    backend: str
    before: Estimate
    after: Estimate
    low: float
    high: float
    unsure: str = ""

    @staticmethod
    def of(before: Estimate, after: Estimate, *, model: str, backend: str) -> Prediction:
        """From both times; unsure where either is, and where the interval has "no gain" in it."""
        down = math.hypot(_log(after.seconds, after.low), _log(before.high, before.seconds))
        up = math.hypot(_log(after.high, after.seconds), _log(before.seconds, before.low))
        middle = _log(after.seconds, before.seconds)
        if before == after:  # the same work errs the same way
            down = up = 0.0
        low, high = math.exp(middle - down), math.exp(middle + up)
        unsure = before.unsure or after.unsure
        if not unsure and low <= 1 <= high:
            unsure = f"{low:.2f} to {high:.2f} of the time"
        return Prediction(model, backend, before, after, low, high, unsure)

    @property
    def ratio(self) -> float:
        """after / before: below 1 is faster."""
        return self.after.seconds / self.before.seconds

    @property
    def slower(self) -> bool:
        """Whether the rewrite surely does not pay."""
        return not self.unsure and self.low > 1

    def __str__(self) -> str:
        told = f"{_time(self.before.seconds)} → {_time(self.after.seconds)}"
        return f"{told} on {self.backend}" + (f" (unsure: {self.unsure})" if self.unsure else "")


def estimate_all(model: CostModel, works: Iterable[Work], backend: str) -> Estimate:
    """Of works that follow each other."""
    estimates = [model.estimate(work, backend) for work in works]
    return sum(estimates[1:], estimates[0]) if estimates else Estimate(0.0, 0.0, 0.0)


def compare(
    model: CostModel, before: Sequence[Work], after: Sequence[Work], backend: str
) -> Prediction:
    """What a model says about putting `after` in the place of `before`; neither may be empty."""
    old, new = (estimate_all(model, works, backend) for works in (before, after))
    return Prediction.of(old, new, model=model.name, backend=backend)


def total_prediction(predictions: Sequence[Prediction]) -> Prediction:
    """Of rewrites that follow each other, at least one, by one model."""
    first = predictions[0]
    before, after = (
        sum(times[1:], times[0])
        for times in ([p.before for p in predictions], [p.after for p in predictions])
    )
    return Prediction.of(before, after, model=first.model, backend=first.backend)


def _log(large: float, small: float) -> float:
    return math.log(large / small)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
