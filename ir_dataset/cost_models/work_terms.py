"""Time of a configuration as a sum of what it does: learned from few shapes, it holds for others.

    seconds = w0 + w1 tiles + w2 blocks + w3 cells + w4 cells beyond a cache + ...

The weights are of one kind of kernel in one configuration and are not negative; they come from least
squares of the relative error over the shapes that were measured. Trees cannot extend a sum beyond what
they saw; this can, and the trees correct what it leaves out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ir_dataset.cost_models.ranking import Floats, Groups

__all__ = ["CACHES", "predicted_logs", "work_terms"]

CACHES = (32e3, 48e3, 512e3, 2e6)
"""Bytes of a thread's share beyond which cells cost more: around the sizes of first and second level."""
LEAST_SHAPES = 5
"""Measured shapes below which nothing is fitted."""
MISSES = (
    *("misses_first_cache", "misses_second_cache", "misses_half_first", "misses_half_second"),
    *("misses_pages", "lines_on_a_set", "shared_lines"),
)


def work_terms(features: Floats, names: tuple[str, ...]) -> Floats:
    """[rows, terms] of what a thread does, from the columns of `cpu_features.NAMES`."""
    column = {name: features[:, at] for at, name in enumerate(names)}
    tiles = column["tiles_of_thread"] * column["blocks"]
    cells = tiles * column["strips_in_row"] * np.exp2(column["log_depth"])
    share = np.exp2(column["log_share_bytes"])
    terms = [np.ones(len(cells)), tiles, column["blocks"], cells]
    terms += [cells * np.maximum(0.0, 1.0 - cache / share) for cache in CACHES]
    terms += [cells * column[name] for name in MISSES]
    return np.stack(terms, 1)


def predicted_logs(asked: Groups, known: Groups, same: tuple[str, ...]) -> Floats:
    """Log seconds of each row of `asked`, from rows of `known` with equal values in the columns `same`.

    A row's own group is left out where `known` has it.

    Returns:
        [rows]; NaN where fewer than `LEAST_SHAPES` groups are known.
    """
    at = [known.names.index(name) for name in same]
    both = np.vstack([known.features[:, at], asked.features[:, at]])
    _, number = np.unique(both, axis=0, return_inverse=True)
    number = number.ravel()
    of_known, of_asked = number[: len(known.groups)], number[len(known.groups) :]
    terms, wanted = (work_terms(g.features, g.names) for g in (known, asked))
    found = np.full(len(asked.groups), np.nan)
    for kind in np.unique(of_asked):
        mine = np.flatnonzero(of_known == kind)
        theirs = np.flatnonzero(of_asked == kind)
        found[theirs] = _of_one_kind(
            terms[mine],
            known.seconds[mine],
            known.groups[mine],
            wanted[theirs],
            asked.groups[theirs],
        )
    return found


def _of_one_kind(
    terms: Floats,
    seconds: Floats,
    groups: NDArray[np.int64],
    wanted: Floats,
    wanted_groups: NDArray[np.int64],
) -> Floats:
    found = np.full(len(wanted), np.nan)
    for row, group in enumerate(wanted_groups):
        kept = groups != group
        if kept.sum() >= LEAST_SHAPES:
            told = float(wanted[row] @ _weights(terms[kept], seconds[kept]))
            found[row] = np.log(max(told, seconds[kept].min() * 1e-3))
    return found


def _weights(terms: Floats, seconds: Floats) -> Floats:
    from scipy.optimize import nnls

    relative = terms / seconds[:, None]
    scale = relative.max(0) + 1e-30
    return nnls(relative / scale, np.ones(len(seconds)))[0] / scale
