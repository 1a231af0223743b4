"""Under which cost model passes and backends are chosen: none, outside of every `with costing(...)`."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

from rewriter.cost.model import CostModel, Prediction, compare
from rewriter.cost.work import Work

__all__ = ["Costing", "costing", "current", "on_backend", "predict"]


@dataclass(frozen=True)
class Costing:
    """The model that is asked, and the backend that the program will run on."""

    model: CostModel
    backend: str = "eager"


_CURRENT: ContextVar[Costing | None] = ContextVar("costing", default=None)


@contextlib.contextmanager
def costing(model: CostModel) -> Generator[Costing, None, None]:
    """Predict the time of every rewrite inside of the block, and leave out those that surely lose.

    An approximate pass is applied whatever the prediction, as it was asked for by name. Where the
    model is unsure, every pass is.
    """
    with _set(Costing(model)) as how:
        assert how is not None
        yield how


@contextlib.contextmanager
def on_backend(name: str | None) -> Generator[None, None, None]:
    """Predictions inside of the block are for this backend; None for one that no model knows."""
    how = _CURRENT.get()
    with _set(None if how is None or name is None else replace(how, backend=name)):
        yield


def current() -> Costing | None:
    """What applies here."""
    return _CURRENT.get()


def predict(before: Sequence[Work], after: Sequence[Work]) -> Prediction | None:
    """Of a rewrite; None outside of `costing`, and where the pass does not describe its work."""
    how = _CURRENT.get()
    if how is None or not before or not after:
        return None
    return compare(how.model, before, after, how.backend)


@contextlib.contextmanager
def _set(how: Costing | None) -> Generator[Costing | None, None, None]:
    token = _CURRENT.set(how)
    try:
        yield how
    finally:
        _CURRENT.reset(token)
