"""How many bytes of machine code a function becomes, told from its unoptimised IR.

A linear model over instruction classes after estimated inlining, with weights that are not negative,
gives a first guess; boosted trees predict the log of what is left. They learn quantiles of it: the
relative error that is judged weighs too much harder than too little, so the answer lies below the median.
Two others give the interval: they learn from three quarters of the projects, and are widened until the
share that was asked for of the other quarter's functions lies inside (conformalised quantile regression,
Romano et al. 2019). Rows are one of each normalised hash, and folds hold out whole projects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ir_dataset.cost_models import boosting, stored
from rewriter.errors import ConfigError, InputError

if TYPE_CHECKING:
    import lightgbm

__all__ = ["KINDS", "SizeAnswer", "SizeModel", "SizeRows", "SizeSettings", "evaluate", "metrics"]

Floats = NDArray[np.float64]
KINDS = ("Oz", "O2")


@dataclass(frozen=True)
class SizeRows:
    """Functions to learn from.

    Attributes:
        features: [rows, names]. names: of the columns, `ir_dataset.features.FEATURES`.
        sizes: [rows], bytes at one level.
        projects: [rows], what folds hold together.
        weights: [rows] or None.
    """

    features: NDArray[np.float32]
    names: tuple[str, ...]
    sizes: Floats
    projects: NDArray[Any]

    def chosen(self, rows: NDArray[Any]) -> SizeRows:
        """Those rows alone."""
        return SizeRows(self.features[rows], self.names, self.sizes[rows], self.projects[rows])


@dataclass(frozen=True)
class SizeSettings:
    """How the trees grow.

    Attributes:
        kind: `Oz` or `O2`, which says whose inlining the linear part sees.
        quantile: of the answer; below 0.5, see the module. low, high: of the interval.
        members: of the ensemble whose median is the answer.
    """

    kind: str = "Oz"
    quantile: float = 0.42
    low: float = 0.1
    high: float = 0.9
    members: int = 1
    trees: int = 300
    leaves: int = 63
    rate: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError("kind", self.kind, f"one of {', '.join(KINDS)}")
        if not 0 < self.low < self.quantile < self.high < 1:
            raise ConfigError("quantile", self.quantile, "between low and high, in (0, 1)")


@dataclass(frozen=True)
class SizeAnswer:
    """Bytes, the interval, and which rows lie where nothing was learned; all [rows]."""

    size: Floats
    low: Floats
    high: Floats
    unsure: NDArray[np.bool_]


@dataclass(frozen=True)
class SizeModel:
    """What was learned; see the module."""

    names: tuple[str, ...]
    settings: SizeSettings
    linear: Floats
    boosters: Mapping[str, Sequence[lightgbm.Booster]]
    bounds: tuple[Floats, Floats]
    """Of each feature, the least and most that was seen."""
    margin: float = 0.0
    """By which the log of the interval is wider on both sides than its trees say."""
    training_data: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def fit(
        rows: SizeRows,
        settings: SizeSettings | None = None,
        *,
        seed: int = 0,
        training_data: str = "",
        intervals: bool = True,
    ) -> SizeModel:
        """Learn; the same rows and seed give the same model.

        Raises:
            InputError: no rows, or a size that is not positive.
        """
        settings = settings or SizeSettings()
        if not len(rows.sizes) or np.any(rows.sizes <= 0):
            raise InputError("sizes: none, or one that is not positive, is not allowed")
        linear = _fit_linear(rows, settings)
        rest = np.log(rows.sizes) - np.log(
            _first_guess(rows.features, rows.names, linear, settings)
        )
        features = _with_guess(rows.features, rows.names, linear, settings)
        answers = [
            _train(features, rest, settings, settings.quantile, seed * 100 + member)
            for member in range(settings.members)
        ]
        boosters, margin = {"answer": answers}, 0.0
        if intervals:
            others, margin = _interval(features, rest, rows.projects, settings, seed)
            boosters |= others
        bounds = (rows.features.min(0).astype(float), rows.features.max(0).astype(float))
        return SizeModel(rows.names, settings, linear, boosters, bounds, margin, training_data)

    def predict(self, features: NDArray[np.float32]) -> SizeAnswer:
        """Bytes of each row of [rows, names]. Raises InputError for another number of columns."""
        if features.ndim != 2 or features.shape[1] != len(self.names):
            raise InputError(
                f"features: {features.shape} is not allowed: [rows, {len(self.names)}]"
            )
        guess = _first_guess(features, self.names, self.linear, self.settings)
        table = _with_guess(features, self.names, self.linear, self.settings)

        def told(role: str) -> Floats:
            members = self.boosters.get(role) or self.boosters["answer"]
            rest = np.median([np.asarray(m.predict(table)) for m in members], 0)
            return guess * np.exp(rest)

        wider = np.exp(self.margin)
        size, low, high = told("answer"), told("low") / wider, told("high") * wider
        outside = (features < self.bounds[0]) | (features > self.bounds[1])
        unsure = outside.any(1) | (high > 4 * np.maximum(low, 1))
        return SizeAnswer(size, np.minimum(low, size), np.maximum(high, size), unsure)

    def save(self, path: Path) -> None:
        """Write as one JSON document; see `stored`."""
        texts = {
            role: tuple(b.model_to_string() for b in members)
            for role, members in self.boosters.items()
        }
        parameters = {
            "settings": {**vars(self.settings)},
            "linear": self.linear.tolist(),
            "bounds": [bound.tolist() for bound in self.bounds],
            "margin": self.margin,
        }
        stored.save(
            stored.StoredModel(
                "size", self.names, texts, parameters, self.training_data, self.metrics
            ),
            path,
        )

    @staticmethod
    def load(path: Path) -> SizeModel:
        """Read what `save` wrote. Raises ArtifactError; see `stored.load`."""
        told = stored.load(path, "size")
        return SizeModel(
            told.features,
            SizeSettings(**told.parameters["settings"]),
            np.array(told.parameters["linear"]),
            {role: stored.boosters_of(texts) for role, texts in told.boosters.items()},
            (np.array(told.parameters["bounds"][0]), np.array(told.parameters["bounds"][1])),
            told.parameters["margin"],
            told.training_data,
            told.metrics,
        )


def metrics(predicted: Floats, actual: Floats) -> dict[str, float]:
    """Mean and median absolute relative error, Kendall's tau, Spearman's rho, and R² of the logs."""
    from scipy import stats

    relative = np.abs(predicted - actual) / actual
    rest = np.log(predicted) - np.log(actual)
    spread = np.log(actual) - np.log(actual).mean()
    return {
        "mape": float(relative.mean()),
        "median_ape": float(np.median(relative)),
        "tau": float(stats.kendalltau(predicted, actual).statistic),
        "spearman": float(stats.spearmanr(predicted, actual).statistic),
        "r2_log": float(1 - (rest**2).sum() / (spread**2).sum()),
        "rows": float(len(actual)),
    }


def evaluate(
    rows: SizeRows,
    settings: SizeSettings,
    *,
    folds: int = 5,
    seed: int = 0,
    by_project: bool = True,
    fit: Any = None,
) -> dict[str, float]:
    """Metrics over all rows, each predicted by a model that did not see it, or its project.

    Args:
        by_project: hold out whole projects; rows at random otherwise, which leaks.
        fit: `(rows, seed) -> object with predict`; `SizeModel.fit` with the settings unless given.
    """
    random = np.random.default_rng(seed)
    if by_project:
        owner = _balanced(rows.projects, folds, random)
    else:
        owner = random.integers(0, folds, len(rows.sizes))
    predicted, low, high = (np.zeros(len(rows.sizes)) for _ in range(3))
    for fold in range(folds):
        held = owner == fold
        train = rows.chosen(np.flatnonzero(~held))
        model = fit(train, seed) if fit else SizeModel.fit(train, settings, seed=seed)
        answer = model.predict(rows.features[held])
        predicted[held], low[held], high[held] = answer.size, answer.low, answer.high
    inside = (rows.sizes >= low) & (rows.sizes <= high)
    return {**metrics(predicted, rows.sizes), "inside_interval": float(inside.mean())}


def _balanced(projects: NDArray[Any], folds: int, random: np.random.Generator) -> NDArray[Any]:
    """Folds of whole projects with about as many rows each: large ones first, to the emptiest."""
    names, number, counts = np.unique(projects, return_inverse=True, return_counts=True)
    noisy = counts * random.uniform(0.7, 1.3, len(names))
    load, place = np.zeros(folds), np.zeros(len(names), int)
    for name in np.argsort(-noisy):
        place[name] = int(np.argmin(load))
        load[place[name]] += counts[name]
    return place[number]


def _linear_columns(names: Sequence[str], kind: str) -> list[int]:
    prefix = kind.lower() + "_"
    return [at for at, name in enumerate(names) if name.startswith(prefix)]


def _fit_linear(rows: SizeRows, settings: SizeSettings) -> Floats:
    """Bytes of each class, not negative, by least squares of the relative error; the last is constant."""
    from scipy.optimize import nnls

    columns = _linear_columns(rows.names, settings.kind)
    table = np.hstack([rows.features[:, columns].astype(float), np.ones((len(rows.sizes), 1))])
    weight = 1.0 / rows.sizes
    gram = (table * weight[:, None]).T @ (table * weight[:, None])
    gram += 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))
    root = np.linalg.cholesky(gram)
    right = np.linalg.solve(root, (table * weight[:, None]).T @ np.ones(len(weight)))
    return nnls(root.T, right)[0]


def _first_guess(
    features: NDArray[np.float32], names: Sequence[str], linear: Floats, settings: SizeSettings
) -> Floats:
    columns = _linear_columns(names, settings.kind)
    return np.maximum(features[:, columns].astype(float) @ linear[:-1] + linear[-1], 1.0)


def _with_guess(
    features: NDArray[np.float32], names: Sequence[str], linear: Floats, settings: SizeSettings
) -> NDArray[np.float32]:
    guess = np.log(_first_guess(features, names, linear, settings))
    return np.hstack([features, guess[:, None].astype(np.float32)])


def _interval(
    features: NDArray[np.float32],
    rest: Floats,
    projects: NDArray[Any],
    settings: SizeSettings,
    seed: int,
) -> tuple[dict[str, list[lightgbm.Booster]], float]:
    """Trees of both ends, and by how much they have to be wider to hold on projects they did not see."""
    random = np.random.default_rng(seed)
    several = len(np.unique(projects)) > 1
    held = (_balanced(projects, 4, random) if several else random.integers(0, 4, len(rest))) == 0
    if held.all() or not held.any():
        held = np.arange(len(rest)) % 4 == 0
    ends = {
        name: _train(features[~held], rest[~held], settings, quantile, seed * 100)
        for name, quantile in (("low", settings.low), ("high", settings.high))
    }
    low, high = (np.asarray(ends[name].predict(features[held])) for name in ("low", "high"))
    missed = np.maximum(low - rest[held], rest[held] - high)
    margin = float(np.quantile(missed, settings.high - settings.low))
    return {name: [end] for name, end in ends.items()}, max(margin, 0.0)


def _train(
    features: NDArray[np.float32], rest: Floats, settings: SizeSettings, quantile: float, seed: int
) -> lightgbm.Booster:
    import lightgbm

    parameters = boosting.parameters(
        seed,
        leaves=settings.leaves,
        rate=settings.rate,
        objective="quantile",
        alpha=quantile,
        min_data_in_leaf=20,
        feature_fraction=0.5,
        max_bin=127,
    )
    return lightgbm.train(parameters, lightgbm.Dataset(features, rest), settings.trees)
