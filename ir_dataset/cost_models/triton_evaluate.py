"""How good selectors of Triton configurations are on measurements: the same table as for CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ir_dataset.cost_models.evaluate import (
    Judged,
    folds,
    judge_model,
    judge_scores,
    noise_floor,
    summary,
)
from ir_dataset.cost_models.ranking import Floats, Groups
from ir_dataset.cost_models.triton_data import SETTINGS, TritonData, plain

__all__ = ["held_out", "selectors"]


def selectors(data: TritonData, seeds: int) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Each selector's name with a summary, or one for every seed where chance has a part."""
    yield "noise floor", [summary(noise_floor(data.groups, data.last, data.default))]
    yield "default", [summary(_judged(data, np.where(data.default, 0.0, 1.0)))]
    yield "best static (in sample)", [summary(_judged(data, _static(data)))]
    for name in ("guessed_log_seconds", "level0_log_seconds"):
        if name in data.groups.names:
            scores = data.groups.features[:, data.groups.names.index(name)]
            known = "level 0, compiled" if name.startswith("level0") else "level 0"
            yield known, [summary(_judged(data, np.nan_to_num(scores, nan=np.inf)))]
    chance = [np.random.default_rng(seed).random(len(data.last)) for seed in range(seeds)]
    yield "random", [summary(_judged(data, scores)) for scores in chance]
    models = {"level 1": data.groups, "level 1 without code": plain(data.groups)}
    for kind, count in (("shape", 5), ("family", len(data.names)), ("random", 5)):
        if kind == "family" and count < 2:
            continue
        for name, groups in models.items():
            found = [held_out(data, groups, kind, count, seed) for seed in range(seeds)]
            yield f"{name}, held-out {kind}", found


def held_out(
    data: TritonData, groups: Groups, kind: str, count: int, seed: int
) -> dict[str, float]:
    """A summary of what a model says of groups that it did not learn from; `kind` as of `folds`."""
    judged: list[Judged] = []
    for held in folds(kind, groups.groups, data.families, count, seed):
        if not held.any():
            continue
        found = judge_model(groups, data.last, held, data.default, SETTINGS, seed)
        judged += [one for one, _ in found]
    return summary(judged)


def _static(data: TritonData) -> Floats:
    """One configuration for all shapes of a kernel: its mean log time beside the others'."""
    times = np.bincount(data.configs, data.groups.centred())
    return (times / np.bincount(data.configs))[data.configs]


def _judged(data: TritonData, scores: Floats) -> list[Judged]:
    found = []
    for group in np.unique(data.groups.groups):
        at = np.flatnonzero(data.groups.groups == group)
        default = np.flatnonzero(data.default[at])
        if len(default):
            seconds = data.last[at]
            found.append(judge_scores(int(group), scores[at], seconds, int(default[0])))
    return found
