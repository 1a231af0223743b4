"""Measurements of the Triton kernels joined with what is known of each configuration, to learn from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ir_dataset.cost_models import triton_points
from ir_dataset.cost_models.ranking import Floats, Groups, Settings
from ir_dataset.cost_models.triton_code import CODE, LLIR
from ir_dataset.cost_models.triton_points import KERNEL, LEVEL0, PLAIN
from rewriter.errors import ArtifactError

__all__ = [
    "FORMAT",
    "SETTINGS",
    "TritonData",
    "document",
    "joined",
    "load",
    "plain",
    "read_document",
]

FORMAT = 1
SETTINGS = Settings(members=3, trees=200, leaves=24, ranker_weight=0.5, kernel_features=KERNEL)
"""As on the CPU; not chosen by measurements on a GPU, of which there are none yet."""


@dataclass(frozen=True)
class TritonData:
    """Measured groups, each a family at a shape.

    Attributes:
        groups: seconds are the least of the first half of the passes.
        last: [rows], the least of the other half. families: [rows], numbers in the order of names.
        default: [rows], True at the default configuration.
        configs: [rows], equal numbers for equal configurations of a kernel.
        digest: of the points that the features are from. names: of the families.
    """

    groups: Groups
    last: Floats
    families: NDArray[np.int64]
    default: NDArray[np.bool_]
    configs: NDArray[np.int64]
    digest: str
    names: tuple[str, ...]


def document(
    lines: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], points: Mapping[str, Any]
) -> dict[str, Any]:
    """What is kept of a run: see `read_document`.

    Args:
        lines: of `triton_measure.measured_lines`.
        machine: device, versions, commit. points: `hash` and `target` of the pack's file.
    """
    shapes = []
    for line in lines:
        configs = line["configs"]
        names = list(configs[0]["config"])
        shapes.append(
            {
                "family": line["family"],
                "shape": line["shape"],
                "knobs": names,
                "clocks": line["clocks"],
                "texts": line["texts"],
                "configs": [[one["config"][name] for name in names] for one in configs],
                "reasons": {
                    str(i): one["reason"] for i, one in enumerate(configs) if one["reason"]
                },
                "min_us": [_micro(one["min"]) for one in configs],
                "median_us": [_micro(one["median"]) for one in configs],
            }
        )
    return {"format": FORMAT, "machine": dict(machine), "points": dict(points), "shapes": shapes}


def _micro(seconds: Sequence[float]) -> list[float]:
    return [round(one * 1e6, 3) for one in seconds]


def read_document(path: Path) -> dict[str, Any]:
    """A document of `format`, `machine`, `points` and `shapes`.

    Of each shape: `configs`, lists of the values of `knobs`; of each configuration the least and the
    median microseconds of every pass; why one was not measured, by its position, in `reasons`.

    Raises:
        ArtifactError: it is missing, no such document, or of another format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"measurements {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ArtifactError(f"measurements {path} are of another format than {FORMAT}")
    return found


def load(measured: Path, points: Path | None = None) -> TritonData:
    """Measurements with the features of a pack's points, or of those that come with the package.

    Raises:
        ArtifactError: a file cannot be read, the points are not those that were measured, or fewer
            than two passes or two shapes were.
    """
    points = points or triton_points.shipped()
    table, digest = triton_points.read(points)
    found = read_document(measured)
    if found["points"]["hash"] != digest:
        raise ArtifactError(f"{points} is not what was measured: its hash is {digest}")
    return joined(found, table, digest)


def joined(found: Mapping[str, Any], table: Any, digest: str) -> TritonData:
    """The same from what was read; configurations that were not measured are left out."""
    at = {
        key: row
        for row, key in enumerate(
            zip(*(table.column(n).to_pylist() for n in ("family", "shape", "config")), strict=True)
        )
    }
    rows, groups, seconds = [], [], []
    for number, shape in enumerate(found["shapes"]):
        for values, least in zip(shape["configs"], shape["min_us"], strict=True):
            config = json.dumps(dict(zip(shape["knobs"], values, strict=True)))
            row = at.get((shape["family"], json.dumps(shape["shape"]), config))
            if row is None:
                raise ArtifactError(f"points lack {shape['family']} {shape['shape']} {config}")
            if least:
                rows.append(row)
                groups.append(number)
                seconds.append(least)
    passes = {len(one) for one in seconds}
    if len(passes) != 1 or max(passes) < 2 or len(set(groups)) < 2:
        raise ArtifactError("measurements need two shapes, and as many passes of each, at least 2")
    return _data(table.take(rows), np.array(groups), np.array(seconds) * 1e-6, digest)


def _data(table: Any, groups: NDArray[np.int64], seconds: Floats, digest: str) -> TritonData:
    names = (*PLAIN, *LEVEL0, *CODE, *LLIR)
    features = np.stack([table.column(n).to_numpy().astype(float) for n in names], 1)
    changing = np.array([len(np.unique(c[~np.isnan(c)])) > 1 for c in features.T])
    changing |= np.isin(names, PLAIN)
    kept = tuple(name for name, keep in zip(names, changing, strict=True) if keep)
    families = table.column("family").to_pylist()
    known = tuple(dict.fromkeys(families))
    texts = [f"{f} {c}" for f, c in zip(families, table.column("config").to_pylist(), strict=True)]
    half = seconds.shape[1] // 2
    return TritonData(
        Groups(features[:, changing], kept, groups, seconds[:, :half].min(1)),
        seconds[:, half:].min(1),
        np.array([known.index(family) for family in families]),
        np.array(table.column("default").to_pylist()),
        np.unique(texts, return_inverse=True)[1],
        digest,
        known,
    )


def plain(groups: Groups) -> Groups:
    """Without what a compiler says: what a ranker has before anything is compiled."""
    kept = [at for at, name in enumerate(groups.names) if name in PLAIN]
    names = tuple(groups.names[at] for at in kept)
    return replace(groups, features=groups.features[:, kept], names=names)
