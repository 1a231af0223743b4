"""How often a model picks the faster of two alternatives, beside the roofline, always, and never.

What is learned comes from one pass of measurements, what is judged from the other. Held out is a shape in
all its dtypes and ways, or an operator. A choice is correct where it takes at most 5 % more than the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ir_dataset.cost_models.alternatives import LearnedModel, Settings
from ir_dataset.cost_models.alternatives_data import (
    DECISIONS,
    AlternativesData,
    Decision,
    Row,
    decisions,
)
from ir_dataset.cost_models.evaluate import interval, mean_slowdown
from rewriter.cost.model import CostModel, Prediction
from rewriter.cost.roofline import Roofline

__all__ = ["Outcome", "evaluate", "judge", "summary"]

TIE = 1.05
_FOLDS = 5


@dataclass(frozen=True)
class Outcome:
    """One decision under one selector.

    Attributes:
        slowdown: of what the likelier time picks. as_used: of what passes do: apply unless surely slower.
        covered: whether the interval has the measured ratio in it; None where there is no interval.
    """

    kind: str
    slowdown: float
    as_used: float
    unsure: bool = False
    covered: bool | None = None


def judge(data: AlternativesData, decision: Decision, told: Prediction | bool) -> Outcome:
    """Of a prediction, or of always (True) or never (False) putting the second in place."""
    before, after = (data.rows[n].judged for n in (decision.before, decision.after))

    def slowdown(apply: bool) -> float:
        return (after if apply else before) / min(before, after)

    if isinstance(told, bool):
        return Outcome(decision.kind, slowdown(told), slowdown(told))
    return Outcome(
        decision.kind,
        slowdown(told.ratio < 1),
        slowdown(not told.slower),
        bool(told.unsure),
        told.low <= after / before <= told.high,
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Shares, geometric means and the worst."""
    slow = [o.slowdown for o in outcomes]
    sure = [o.slowdown for o in outcomes if not o.unsure]
    covered = [o.covered for o in outcomes if o.covered is not None]
    found = {
        "correct": float(np.mean([s <= TIE for s in slow])),
        "slowdown": mean_slowdown(slow),
        "slowdown_max": max(slow),
        "unsure": float(np.mean([o.unsure for o in outcomes])),
        "as_used": mean_slowdown([o.as_used for o in outcomes]),
        "as_used_max": max(o.as_used for o in outcomes),
    }
    if sure:
        found["correct_where_sure"] = float(np.mean([s <= TIE for s in sure]))
    if covered:
        found["covered"] = float(np.mean(covered))
    return found


def evaluate(
    data: AlternativesData, seeds: Iterable[int], settings: Settings | None = None
) -> list[dict[str, Any]]:
    """One row for each selector and kind of decision; over the seeds the mean and 95 % around it."""
    seeds, pairs = list(seeds), list(decisions(data.rows))
    selectors: dict[str, list[list[Outcome]]] = {
        "measured before": [[judge(data, d, _faster(data, d)) for d in pairs]],
        "always apply": [[judge(data, d, True) for d in pairs]],
        "always leave": [[judge(data, d, False) for d in pairs]],
        "roofline": [list(_judged(data, pairs, lambda t: Roofline(data.ceilings[t])))],
        "learned, held-out shape": [
            list(_held_out_shapes(data, pairs, seed, settings)) for seed in seeds
        ],
        "learned, held-out operator": [
            list(_held_out_operators(data, pairs, seed, settings)) for seed in seeds
        ],
    }
    return [
        {"selector": name, "decision": kind, **_over_seeds(runs, kind)}
        for name, runs in selectors.items()
        for kind in ("all", *DECISIONS)
    ]


def _faster(data: AlternativesData, decision: Decision) -> bool:
    return data.rows[decision.after].seconds < data.rows[decision.before].seconds


def _judged(
    data: AlternativesData, pairs: Iterable[Decision], model: Callable[[int], CostModel]
) -> Iterator[Outcome]:
    """`model`: by number of threads."""
    models = {threads: model(threads) for threads in data.ceilings}
    for pair in pairs:
        before, after = data.rows[pair.before], data.rows[pair.after]
        estimates = [models[row.threads].estimate(row.work, row.backend) for row in (before, after)]
        yield judge(data, pair, Prediction.of(*estimates, model="", backend=after.backend))


def _held_out_shapes(
    data: AlternativesData, pairs: Sequence[Decision], seed: int, settings: Settings | None
) -> Iterator[Outcome]:
    shapes = sorted({row.shape for row in data.rows})
    part = np.random.default_rng(seed).permutation(len(shapes)) % min(_FOLDS, len(shapes))
    held = {shape: int(fold) for shape, fold in zip(shapes, part, strict=True)}
    for fold in sorted(set(held.values())):
        known = [row for row in data.rows if held[row.shape] != fold]
        asked = [pair for pair in pairs if held[data.rows[pair.before].shape] == fold]
        yield from _learned(data, known, asked, seed, settings)


def _held_out_operators(
    data: AlternativesData, pairs: Sequence[Decision], seed: int, settings: Settings | None
) -> Iterator[Outcome]:
    """Decisions by the operator that is put in place; int8 weights count as one of their own."""

    def operator(row: Row) -> str:
        return row.work.operator + (" int8" if row.work.weight_dtype == "int8" else "")

    for name in sorted({operator(row) for row in data.rows}):
        known = [row for row in data.rows if operator(row) != name]
        asked = [pair for pair in pairs if operator(data.rows[pair.after]) == name]
        yield from _learned(data, known, asked, seed, settings)


def _learned(
    data: AlternativesData,
    known: Sequence[Row],
    asked: Sequence[Decision],
    seed: int,
    settings: Settings | None,
) -> Iterator[Outcome]:
    model = LearnedModel.fit(data, known, settings=settings, seed=seed)
    return _judged(data, asked, lambda threads: model.at(data.ceilings[threads]))


def _over_seeds(runs: Sequence[Sequence[Outcome]], kind: str) -> dict[str, Any]:
    chosen = [[o for o in run if kind in ("all", o.kind)] for run in runs]
    if not chosen[0]:
        return {"pairs": 0}
    found = [summary(run) for run in chosen]
    row: dict[str, Any] = {"pairs": len(chosen[0])}
    for name in found[0]:
        values = [told[name] for told in found if name in told]
        row[name], spread = interval(values) if len(values) > 1 else (values[0], None)
        if name.endswith("max"):
            row[name] = max(values)
        elif spread is not None:
            row[f"{name}_spread"] = spread
    return row
