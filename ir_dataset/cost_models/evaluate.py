"""How good a selector of configurations is: splits, metrics, and the selectors that it has to beat.

Everything is chosen by one half of the measured passes and judged by the other, so that noise helps
nobody. Splits hold out shapes of known families, or whole families; the random split lets rows of
one group into both parts, which leaks, and is there to show by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ir_dataset.cost_models.ranking import Floats, Groups, Ranking, RankingModel, Settings

__all__ = [
    "Judged",
    "folds",
    "interval",
    "judge_model",
    "judge_scores",
    "kendall",
    "mean_slowdown",
    "noise_floor",
    "summary",
]

TOP = (1, 3, 5)


@dataclass(frozen=True)
class Judged:
    """One group under one selector.

    Attributes:
        slowdown: by k: the best of the k first, beside the best of all; 1 is perfect.
        with_default: the same with the default configuration measured besides.
        tau: Kendall's, of scores with times.
        default: slowdown of the default configuration.
        unsure: whether the selector said so.
    """

    group: int
    slowdown: dict[int, float]
    with_default: dict[int, float]
    tau: float
    default: float
    unsure: bool = False


def kendall(scores: Floats, seconds: Floats) -> float:
    """Kendall's tau-b; 0 where one of them is constant."""
    first = np.sign(scores[:, None] - scores[None])
    second = np.sign(seconds[:, None] - seconds[None])
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale else 0.0


def judge_scores(
    group: int, scores: Floats, seconds: Floats, default: int, unsure: bool = False
) -> Judged:
    """Judge scores of a group's rows, less is better; ties in the order of the rows."""
    order = np.argsort(scores, kind="stable")
    best = seconds.min()
    slowdown = {k: float(seconds[order[:k]].min() / best) for k in TOP}
    beside = {k: min(s, float(seconds[default] / best)) for k, s in slowdown.items()}
    tau = kendall(scores, seconds)
    return Judged(group, slowdown, beside, tau, float(seconds[default] / best), unsure)


def folds(
    kind: str, groups: NDArray[np.int64], families: NDArray[np.int64], count: int, seed: int
) -> Iterator[NDArray[np.bool_]]:
    """Masks of the rows that are held out, each row once.

    Args:
        kind: `shape`, `family` or `random`.
        groups, families: [rows].
    """
    random = np.random.default_rng([seed, count])
    if kind == "random":
        owner = random.integers(0, count, len(groups))
    elif kind == "family":
        names = np.unique(families)
        place = dict(zip(random.permutation(names), np.arange(len(names)) % count, strict=True))
        owner = np.array([place[name] for name in families])
    else:
        owner = np.zeros(len(groups), int)
        for family in np.unique(families):
            own = np.unique(groups[families == family])
            place = dict(zip(random.permutation(own), np.arange(len(own)) % count, strict=True))
            rows = families == family
            owner[rows] = [place[group] for group in groups[rows]]
    for part in range(count):
        yield owner == part


def judge_model(
    data: Groups,
    judged_by: Floats,
    held_out: NDArray[np.bool_],
    default_rows: NDArray[np.bool_],
    settings: Settings,
    seed: int,
    *,
    prepare: Callable[[Groups, Groups], tuple[Groups, Groups]] | None = None,
) -> Iterator[tuple[Judged, Ranking]]:
    """Learn from the other rows, and judge each group of those that are held out.

    Args:
        judged_by: [rows], seconds of the passes that nothing was learned from.
        default_rows: [rows], True at the default configuration of each group.
        prepare: adds features that depend on what is learned from, e.g. `priors.with_priors`.
    """
    known, asked = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    train, test = data.chosen(known), data.chosen(asked)
    if prepare is not None:
        train, test = prepare(train, test)
    model = RankingModel.fit(train, settings, seed=seed)
    for group in np.unique(test.groups):
        rows = np.flatnonzero(test.groups == group)
        at = np.flatnonzero(default_rows[asked[rows]])
        ranking = model.rank(test.features[rows], int(at[0]) if len(at) else None)
        default = int(at[0]) if len(at) else 0
        seconds = judged_by[asked[rows]]
        yield (
            judge_scores(int(group), ranking.score, seconds, default, bool(ranking.unsure)),
            ranking,
        )


def noise_floor(data: Groups, judged_by: Floats, default_rows: NDArray[np.bool_]) -> list[Judged]:
    """The selector that measured everything in the passes it may see."""
    found = []
    for group in np.unique(data.groups):
        rows = np.flatnonzero(data.groups == group)
        default = int(np.flatnonzero(default_rows[rows])[0])
        found.append(judge_scores(int(group), data.seconds[rows], judged_by[rows], default))
    return found


def mean_slowdown(values: Sequence[float]) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def summary(judged: Sequence[Judged]) -> dict[str, float]:
    """Geometric means and maxima by k, tau, and what abstaining where unsure gives."""
    found: dict[str, float] = {"groups": float(len(judged))}
    for k in TOP:
        found[f"top{k}"] = mean_slowdown([j.slowdown[k] for j in judged])
        found[f"top{k}_max"] = max(j.slowdown[k] for j in judged)
        found[f"top{k}_with_default"] = mean_slowdown([j.with_default[k] for j in judged])
    found["tau"] = float(np.mean([j.tau for j in judged]))
    found["default"] = mean_slowdown([j.default for j in judged])
    found["unsure_share"] = float(np.mean([j.unsure for j in judged]))
    abstained = [j.default if j.unsure else j.slowdown[1] for j in judged]
    found["top1_or_default"] = mean_slowdown(abstained)
    sure = [j for j in judged if not j.unsure]
    if sure:
        found["sure_top1"] = mean_slowdown([j.slowdown[1] for j in sure])
        found["sure_default"] = mean_slowdown([j.default for j in sure])
    found["correct"] = float(np.mean([not j.unsure and j.slowdown[1] <= 1.02 for j in judged]))
    found["wrong"] = float(np.mean([not j.unsure and j.slowdown[1] > 1.02 for j in judged]))
    found["default_better"] = float(
        np.mean([not j.unsure and j.default < j.slowdown[1] * 0.98 for j in judged])
    )
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the half width of its 95 % interval by Student's t over the seeds."""
    if len(values) < 2:
        return float(values[0]), float("nan")
    wide = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 1.96)
    spread = float(np.std(values, ddof=1))
    return float(np.mean(values)), wide * spread / float(np.sqrt(len(values)))
