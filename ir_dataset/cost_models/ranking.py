"""Level 1: which configuration of a kernel is fastest, learned by boosted trees from measured ones.

A group is a kernel at a shape; its rows are configurations. An ensemble predicts log time beside
the group's best, each member from other groups, and LambdaRank orders within groups; the score is a blend
of both. The spread of the ensemble gives an interval. A group whose kernel features lie further from
every group that was learned from than those lie from each other is out of distribution.

Sources: LightGBM, https://proceedings.neurips.cc/paper/2017/hash/6449f44a102fde848669bdd9eb6b76fa;
LambdaRank for tuning, https://doi.org/10.1145/3575693.3575737 (TLP).
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

__all__ = ["Groups", "Ranking", "RankingModel", "Settings"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Groups:
    """Rows to learn from or to rank.

    Attributes:
        features: [rows, columns]. names: of the columns.
        groups: [rows], which group each row belongs to; rows of a group are adjacent.
        seconds: [rows], measured.
    """

    features: Floats
    names: tuple[str, ...]
    groups: NDArray[np.int64]
    seconds: Floats

    def __post_init__(self) -> None:
        if self.features.shape != (len(self.groups), len(self.names)):
            raise InputError(f"features: {self.features.shape} is not allowed: rows, columns")
        if not np.all(np.isfinite(self.seconds)) or np.any(self.seconds <= 0):
            raise InputError("seconds: a number that is not positive is not allowed")
        changes = np.flatnonzero(np.diff(self.groups)) + 1
        if len(changes) + 1 != len(np.unique(self.groups)):
            raise InputError("groups: rows of a group that are apart are not allowed")

    def chosen(self, rows: NDArray[Any]) -> Groups:
        """Those rows alone."""
        return Groups(self.features[rows], self.names, self.groups[rows], self.seconds[rows])

    def centred(self) -> Floats:
        """Log time less the mean of its group."""
        logs = np.log(self.seconds)
        _, number = np.unique(self.groups, return_inverse=True)
        return logs - (np.bincount(number, logs) / np.bincount(number))[number]

    def slower(self) -> Floats:
        """Log time beside the best of its group."""
        logs = np.log(self.seconds)
        _, number = np.unique(self.groups, return_inverse=True)
        best = np.full(number.max() + 1, np.inf)
        np.minimum.at(best, number, logs)
        return logs - best[number]


@dataclass(frozen=True)
class Settings:
    """How the trees grow, and how careful the answer is.

    Attributes:
        members: of the ensemble. trees, leaves, rate: of each.
        ranker_weight: of LambdaRank in the blend, 0 to 1.
        kernel_features: names that are the same for all rows of a group.
        kind_features: of these, the ones that tell kinds of kernel apart; a kind that was not learned is
            "unsure" however near it lies.
        distance: of an unknown group to the nearest known one, in multiples of the 90th percentile
            among those that were learned from, above which the answer is "unsure".
        spread: standard deviations of the ensemble by which the best has to beat the default.
    """

    members: int = 5
    trees: int = 250
    leaves: int = 24
    rate: float = 0.06
    ranker_weight: float = 0.3
    kernel_features: tuple[str, ...] = ()
    kind_features: tuple[str, ...] = ()
    distance: float = 1.5
    spread: float = 1.0


@dataclass(frozen=True)
class Ranking:
    """The answer for one group.

    Attributes:
        order: rows of the group, the best first.
        score: [rows], less is faster; log time beside the group's best where nothing is blended in.
        low, high: [rows], the interval of predicted log time beside the group's best.
        unsure: why the first should not be taken without measuring; "" where it may be.
        far: whether that is because nothing like this group was learned.
    """

    order: NDArray[np.int64]
    score: Floats
    low: Floats
    high: Floats
    unsure: str = ""
    far: bool = False


@dataclass(frozen=True)
class RankingModel:
    """An ensemble that was learned; see the module."""

    names: tuple[str, ...]
    settings: Settings
    members: Sequence[lightgbm.Booster]
    rankers: Sequence[lightgbm.Booster]
    known: Floats
    """[groups, kernel features], scaled."""
    scale: tuple[Floats, Floats]
    limit: float
    training_data: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def fit(
        data: Groups,
        settings: Settings | None = None,
        *,
        seed: int = 0,
        training_data: str = "",
    ) -> RankingModel:
        """Learn from measured groups; the same data and seed give the same model.

        Raises:
            ConfigError: fewer than two groups, or a kernel feature that is no column.
        """
        settings = settings or Settings()
        known = np.unique(data.groups)
        if len(known) < 2:
            raise ConfigError("groups", len(known), "at least 2 to learn from")
        unknown = set(settings.kernel_features) - set(data.names)
        if unknown:
            raise ConfigError("kernel_features", sorted(unknown), f"of {', '.join(data.names)}")
        unknown = set(settings.kind_features) - set(settings.kernel_features)
        if unknown:
            raise ConfigError("kind_features", sorted(unknown), "of kernel_features")
        random = np.random.default_rng(seed)
        members = []
        for member in range(settings.members):
            drawn = random.choice(known, max(2, round(len(known) * 0.85)), replace=False)
            part = data.chosen(np.flatnonzero(np.isin(data.groups, drawn)))
            members.append(_regressor(part, settings, seed * 1000 + member))
        rankers = [_ranker(data, settings, seed)] if settings.ranker_weight > 0 else []
        kernels, scale = _scaled_kernels(data, settings)
        return RankingModel(
            data.names,
            settings,
            members,
            rankers,
            kernels,
            scale,
            settings.distance * _usual_distance(kernels),
            training_data,
        )

    def rank(self, features: Floats, default: int | None = None) -> Ranking:
        """Order the configurations of one kernel at one shape.

        Args:
            features: [rows, columns] by `names`.
            default: the row of the default configuration, which the best is compared with.

        Raises:
            InputError: another number of columns.
        """
        if features.ndim != 2 or features.shape[1] != len(self.names):
            raise InputError(
                f"features: {features.shape} is not allowed: [rows, {len(self.names)}]"
            )
        told = np.stack([np.asarray(m.predict(features)) for m in self.members])
        mean, spread = (
            told.mean(0),
            told.std(0, ddof=1) if len(told) > 1 else np.zeros(len(told[0])),
        )
        score = mean
        if self.rankers:
            ranked = np.mean([np.asarray(m.predict(features)) for m in self.rankers], 0)
            weight = self.settings.ranker_weight
            score = (1 - weight) * _standard(mean) - weight * _standard(ranked)
        order = np.argsort(score, kind="stable")
        unsure = far = self._far(features)
        if not unsure and default is not None and order[0] != default:
            gains = told[:, default] - told[:, order[0]]
            if gains.mean() < self.settings.spread * gains.std():
                unsure = "the ensemble does not agree that another is faster than the default"
        return Ranking(order, score, mean - 2 * spread, mean + 2 * spread, unsure, bool(far))

    def _far(self, features: Floats) -> str:
        columns = [self.names.index(name) for name in self.settings.kernel_features]
        if not columns:
            return ""
        point = (features[0, columns] - self.scale[0]) / self.scale[1]
        named = self.settings.kernel_features
        kind = [named.index(name) for name in self.settings.kind_features]
        if kind and not np.isclose(self.known[:, kind], point[kind], atol=1e-4).all(1).any():
            return "out of distribution: no kernel of this kind was measured"
        distance = float(np.sqrt(((self.known - point) ** 2).sum(1)).min())
        if distance <= self.limit:
            return ""
        told = f"{distance:.2f} from the nearest known kernel, {self.limit:.2f} allowed"
        return f"out of distribution: {told}"

    # --- as text -----------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write as one JSON document; see `stored`."""
        stored.save(
            stored.StoredModel(
                kind="ranking",
                features=self.names,
                boosters={
                    "members": tuple(m.model_to_string() for m in self.members),
                    "rankers": tuple(m.model_to_string() for m in self.rankers),
                },
                parameters={
                    "settings": {**vars(self.settings)},
                    "known": self.known.round(6).tolist(),
                    "scale": [part.tolist() for part in self.scale],
                    "limit": self.limit,
                },
                training_data=self.training_data,
                metrics=self.metrics,
            ),
            path,
        )

    @staticmethod
    def load(path: Path) -> RankingModel:
        """Read what `save` wrote. Raises ArtifactError; see `stored.load`."""
        told = stored.load(path, "ranking")
        settings = told.parameters["settings"]
        for name in ("kernel_features", "kind_features"):
            settings[name] = tuple(settings.get(name, ()))
        return RankingModel(
            told.features,
            Settings(**settings),
            stored.boosters_of(told.boosters["members"]),
            stored.boosters_of(told.boosters["rankers"]),
            np.array(told.parameters["known"], float),
            (np.array(told.parameters["scale"][0]), np.array(told.parameters["scale"][1])),
            told.parameters["limit"],
            told.training_data,
            told.metrics,
        )


def _parameters(settings: Settings, seed: int, **others: Any) -> dict[str, Any]:
    return boosting.parameters(
        seed,
        leaves=settings.leaves,
        rate=settings.rate,
        min_data_in_leaf=12,
        feature_fraction=0.7,
        **others,
    )


def _regressor(data: Groups, settings: Settings, seed: int) -> lightgbm.Booster:
    import lightgbm

    # What is far from the best need only be known to be far: its error counts less, up to a factor.
    slower = data.slower()
    weight = np.exp(-_HEAD * slower) + 0.05
    goal = np.minimum(slower, _FAR)
    table = lightgbm.Dataset(data.features, goal, weight=weight, feature_name=list(data.names))
    parameters = _parameters(settings, seed, objective="regression")
    return lightgbm.train(parameters, table, settings.trees)


def _ranker(data: Groups, settings: Settings, seed: int) -> lightgbm.Booster:
    import lightgbm

    _, first, sizes = np.unique(data.groups, return_index=True, return_counts=True)
    sizes = sizes[np.argsort(first)]
    labels = np.zeros(len(data.groups), int)
    for group in np.unique(data.groups):
        rows = np.flatnonzero(data.groups == group)
        slower = data.seconds[rows] / data.seconds[rows].min()
        labels[rows] = np.searchsorted(-_GRADES, -slower, side="left")
    table = lightgbm.Dataset(data.features, labels, group=sizes, feature_name=list(data.names))
    parameters = _parameters(
        settings,
        seed,
        objective="lambdarank",
        lambdarank_truncation_level=12,
        label_gain=[2**grade - 1 for grade in range(len(_GRADES) + 1)],
    )
    return lightgbm.train(parameters, table, settings.trees)


_HEAD, _FAR = 3.0, 1.0
"""Decay of a row's weight by its log slowdown, and the log slowdown above which all are alike."""
_GRADES = np.array([2.0, 1.5, 1.3, 1.2, 1.1, 1.05, 1.02])
"""Slowdown beside the group's best at which a label is one grade better."""


def _scaled_kernels(data: Groups, settings: Settings) -> tuple[Floats, tuple[Floats, Floats]]:
    columns = [data.names.index(name) for name in settings.kernel_features]
    _, first = np.unique(data.groups, return_index=True)
    kernels = data.features[first][:, columns]
    centre, width = kernels.mean(0), kernels.std(0) + 1e-9
    return (kernels - centre) / width, (centre, width)


def _usual_distance(kernels: Floats) -> float:
    apart = np.sqrt(((kernels[:, None] - kernels[None]) ** 2).sum(-1))
    np.fill_diagonal(apart, np.inf)
    return float(np.quantile(apart.min(1), 0.9)) if len(kernels) > 1 else 0.0


def _standard(values: Floats) -> Floats:
    return (values - values.mean()) / (values.std() + 1e-12)
