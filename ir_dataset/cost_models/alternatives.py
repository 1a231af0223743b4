"""Level 1 for whole operators: boosted trees on what a time is beside the roofline.

    log(seconds / roofline) = mean of an ensemble, each member from other shapes

The interval holds nine of ten times that models of other shapes were asked for: its width comes from their
errors, for each operator, backend and dtype, and from how far the ensemble disagrees. It is unsure about
operators, backends and dtypes that it has not seen, sizes beyond those that it has, and other machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ir_dataset.cost_models import boosting, stored
from ir_dataset.cost_models.alternatives_data import AlternativesData, Row
from rewriter import processor
from rewriter.cost.cost import Cost
from rewriter.cost.model import Estimate
from rewriter.cost.roofline import Ceilings
from rewriter.cost.work import SIZES, Work
from rewriter.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import lightgbm

__all__ = ["NAMES", "LearnedModel", "Settings", "as_run", "features", "kind_of"]

Floats = NDArray[np.float64]

NAMES = (
    *("log_flops", "log_bytes", "log_roofline", "intensity", "launches", "threads"),
    *(f"log_{name}" for name in SIZES),
    *("group_size", "element_bytes", "weight_bytes", "is_cpu", "is_attention", "copies_heads"),
    *("turns_keys", "is_gathered"),
)
"""Columns: nothing in them names an operator that shares its traits with none."""
_ATTENDED = {"batch_size", "kv_len", "num_heads", "num_kv_heads", "head_dim"}
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_CALIBRATION_FOLDS, _COVERED = 4, 0.9
_BEYOND = math.log2(2.0)
"""How far a size may lie beyond what was learned, as a logarithm."""


@dataclass(frozen=True)
class Settings:
    """How the trees grow. members: of the ensemble; trees, leaves, rate: of each."""

    members: int = 5
    trees: int = 150
    leaves: int = 16
    rate: float = 0.08


def kind_of(work: Work, backend: str) -> str:
    """What has to have been seen: operator, backend, dtypes."""
    return f"{work.operator} {backend} {work.dtype} {work.weight_dtype}"


def as_run(work: Work, backend: str) -> Work:
    """The work as a backend does it: C++ has one attention, which copies no heads."""
    sizes = work.sizes
    if backend != "cpu" or work.operator != "attention" or not sizes.keys() >= _ATTENDED:
        return work
    group_size = sizes["num_heads"] // sizes["num_kv_heads"]
    entries = sizes["batch_size"] * sizes["num_kv_heads"] * sizes["kv_len"]
    copied = 4 * group_size * entries * sizes["head_dim"] * _BYTES.get(work.dtype, 4)
    copies = copied if group_size > 1 else 0
    cost = Cost(work.cost.flops, work.cost.bytes_moved - copies, 1)
    return replace(work, operator="grouped_attention", cost=cost)


def features(work: Work, backend: str, ceilings: Ceilings) -> list[float]:
    """In the order of `NAMES`; a size that the operator does not have is -1."""
    cost, sizes, operator = work.cost, work.sizes, work.operator
    return [
        math.log2(max(cost.flops, 1.0)),
        math.log2(max(cost.bytes_moved, 1.0)),
        math.log2(ceilings.seconds(work)),
        cost.flops / max(cost.bytes_moved, 1.0),
        float(cost.launches),
        float(ceilings.threads),
        *(math.log2(sizes[name]) if sizes.get(name) else -1.0 for name in SIZES),
        sizes.get("num_heads", 0) / max(1, sizes.get("num_kv_heads", 1)),
        float(_BYTES.get(work.dtype, 0)),
        float(_BYTES.get(work.weight_dtype, 0)),
        float(backend == "cpu"),
        float(operator.endswith("attention")),
        float(operator == "attention"),
        float(operator == "streaming_attention"),
        float(operator == "gathered_mlp"),
    ]


class LearnedModel:
    """`CostModel` that was learned; see the module.

    Attributes:
        widths: half widths of the interval of log seconds, by `kind_of`, `""` for all.
        known: least and largest log2 of each size, by `kind_of`.
        learned_on: ceilings of the machine that it was learned on, by number of threads.
        ceilings: of the machine and threads that are asked about.
        training_data: sha256 of what it learned from.
    """

    name = "learned"

    def __init__(
        self,
        members: Sequence[lightgbm.Booster],
        widths: Mapping[str, float],
        known: Mapping[str, Mapping[str, Sequence[float]]],
        *,
        learned_on: Mapping[int, Ceilings],
        training_data: str,
        metrics: Mapping[str, Any],
        ceilings: Ceilings,
    ) -> None:
        self.members, self.widths, self.known = members, widths, known
        self.learned_on, self.ceilings = learned_on, ceilings
        self.training_data, self.metrics = training_data, metrics
        self._answers = dict[tuple[str, Cost, tuple[tuple[str, int], ...]], Estimate]()

    @staticmethod
    def fit(
        data: AlternativesData,
        rows: Sequence[Row] | None = None,
        *,
        settings: Settings | None = None,
        seed: int = 0,
    ) -> LearnedModel:
        """Learn from all rows, or from these; the same give the same model.

        Raises:
            ConfigError: fewer than two shapes.
        """
        rows = data.rows if rows is None else rows
        rows = [replace(row, work=as_run(row.work, row.backend)) for row in rows]
        settings = settings or Settings()
        shapes = sorted({row.shape for row in rows})
        if len(shapes) < 2:
            raise ConfigError("rows", len(shapes), "of at least 2 shapes to learn from")
        table = np.array([features(r.work, r.backend, data.ceilings[r.threads]) for r in rows])
        goal = np.log([r.seconds / data.roofline(r) for r in rows])
        owner = np.array([shapes.index(r.shape) for r in rows])
        random = np.random.default_rng(seed)
        members = []
        for member in range(settings.members):
            drawn = random.choice(len(shapes), max(2, round(len(shapes) * 0.85)), replace=False)
            part = np.isin(owner, drawn)
            members.append(_grown(table[part], goal[part], settings, seed * 100 + member))
        part = random.permutation(len(shapes)) % min(_CALIBRATION_FOLDS, len(shapes))
        wrong = _errors(table, goal, part[owner], settings, seed)
        return LearnedModel(
            members,
            _widths(rows, wrong),
            _known(rows),
            learned_on=data.ceilings,
            training_data=data.digest,
            metrics={"rows": len(rows), "settings": asdict(settings)},
            ceilings=next(iter(data.ceilings.values())),
        )

    def at(self, ceilings: Ceilings) -> LearnedModel:
        """The same model for a machine, or a number of threads, with these ceilings."""
        return LearnedModel(
            self.members,
            self.widths,
            self.known,
            learned_on=self.learned_on,
            training_data=self.training_data,
            metrics=self.metrics,
            ceilings=ceilings,
        )

    def estimate(self, work: Work, backend: str) -> Estimate:
        """Of one call; the interval of an operator that was never seen is that of all."""
        key = (kind_of(work, backend), work.cost, tuple(sorted(work.sizes.items())))
        if key not in self._answers:
            self._answers[key] = self._estimate(work, backend)
        return self._answers[key]

    def _estimate(self, work: Work, backend: str) -> Estimate:
        work = as_run(work, backend)
        row = np.array([features(work, backend, self.ceilings)])
        told = np.array([float(np.asarray(m.predict(row))[0]) for m in self.members])
        middle = math.log(self.ceilings.seconds(work)) + float(told.mean())
        width = self.widths.get(kind_of(work, backend), self.widths[""])
        width = max(width, 2 * float(told.std()))
        low, high = math.exp(middle - width), math.exp(middle + width)
        return Estimate(math.exp(middle), low, high, self._unsure(work, backend))

    def _unsure(self, work: Work, backend: str) -> str:
        """Why nothing like this was learned, or ""."""
        processors = {limits.processor for limits in self.learned_on.values()}
        if self.ceilings.processor not in processors:
            return f"learned on {', '.join(processors)}, not on {self.ceilings.processor}"
        if self.ceilings.threads not in self.learned_on:
            return f"{self.ceilings.threads} threads: learned with {[*self.learned_on]}"
        known = self.known.get(kind_of(work, backend))
        if known is None:
            return f"never saw {kind_of(work, backend).strip()}"
        for name, size in work.sizes.items():
            low, high = known.get(name, (0.0, 0.0))
            if not low - _BEYOND <= math.log2(max(size, 1)) <= high + _BEYOND:
                return f"{name}={size}: learned {2**low:.0f} to {2**high:.0f} for {work.operator}"
        return ""

    # --- as text -----------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write as one JSON document; see `stored`."""
        parameters = {
            "widths": dict(self.widths),
            "known": {kind: dict(sizes) for kind, sizes in self.known.items()},
            "learned_on": [asdict(limits) for limits in self.learned_on.values()],
        }
        texts = {"members": tuple(m.model_to_string() for m in self.members)}
        stored.save(
            stored.StoredModel(
                "alternatives", NAMES, texts, parameters, self.training_data, self.metrics
            ),
            path,
        )

    @staticmethod
    def load(path: Path | None = None, ceilings: Ceilings | None = None) -> LearnedModel:
        """Read what `save` wrote, the one that comes with the package unless given.

        Args:
            ceilings: of this machine. Those that it was learned with unless given, where processor
                and number of threads are the same; else measured, unless they were before.

        Raises:
            ArtifactError: the file is missing or damaged, or has other features than this version.
        """
        told = stored.load(path or stored.shipped("alternatives"), "alternatives")
        if told.features != NAMES:
            raise ArtifactError("cost model of alternatives has other features than this version")
        parameters = told.parameters
        known = {item["threads"]: Ceilings(**item) for item in parameters["learned_on"]}
        own = known.get(torch.get_num_threads())
        if ceilings is None and own is not None and own.processor == processor.name():
            ceilings = own
        return LearnedModel(
            stored.boosters_of(told.boosters["members"]),
            parameters["widths"],
            parameters["known"],
            learned_on=known,
            training_data=told.training_data,
            metrics=told.metrics,
            ceilings=ceilings or Ceilings.here(),
        )


def _grown(table: Floats, goal: Floats, settings: Settings, seed: int) -> lightgbm.Booster:
    import lightgbm

    parameters = boosting.parameters(
        seed,
        leaves=settings.leaves,
        rate=settings.rate,
        objective="regression",
        min_data_in_leaf=5,
        feature_fraction=0.8,
    )
    return lightgbm.train(
        parameters, lightgbm.Dataset(table, goal, feature_name=list(NAMES)), settings.trees
    )


def _errors(table: Floats, goal: Floats, part: Any, settings: Settings, seed: int) -> Floats:
    """[rows], of models that did not see the row's shape."""
    wrong = np.zeros(len(goal))
    for held in np.unique(part):
        out = part == held
        grown = _grown(table[~out], goal[~out], settings, seed * 100 + 50 + int(held))
        wrong[out] = np.abs(np.asarray(grown.predict(table[out])) - goal[out])
    return wrong


def _widths(rows: Sequence[Row], wrong: Floats) -> dict[str, float]:
    names = np.array([kind_of(row.work, row.backend) for row in rows])
    found = {str(n): float(np.quantile(wrong[names == n], _COVERED)) for n in np.unique(names)}
    return {**found, "": float(np.quantile(wrong, _COVERED))}


def _known(rows: Iterable[Row]) -> dict[str, dict[str, list[float]]]:
    known: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        sizes = known.setdefault(kind_of(row.work, row.backend), {})
        for name, size in row.work.sizes.items():
            at = math.log2(size)
            low, high = sizes.get(name, (at, at))
            sizes[name] = [min(low, at), max(high, at)]
    return known
