"""Functions of a corpus with their features and sizes, one of each kind, for the size model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ir_dataset.cost_models.size import Floats, SizeRows
from ir_dataset.features import FEATURES, ModuleFeatures
from ir_dataset.labels import ModuleLabels
from ir_dataset.records import decode
from ir_dataset.store import Store
from rewriter.errors import ArtifactError

__all__ = ["SizeData", "collect", "load", "save"]


@dataclass(frozen=True)
class SizeData:
    """Unique functions.

    Attributes:
        features: float32 [rows, FEATURES].
        sizes: by kind: [rows], bytes, NaN where the function is gone at that level.
        projects, languages: [rows]. digest: sha256 of all of it.
    """

    features: NDArray[np.float32]
    sizes: Mapping[str, Floats]
    projects: NDArray[Any]
    languages: NDArray[Any]

    @property
    def digest(self) -> str:
        """sha256 over the columns."""
        whole = hashlib.sha256(self.features.tobytes())
        for kind in sorted(self.sizes):
            whole.update(kind.encode() + self.sizes[kind].tobytes())
        whole.update("\n".join(self.projects.tolist()).encode())
        return whole.hexdigest()

    def rows(self, kind: str) -> SizeRows:
        """Those that have a size of this kind."""
        at = np.flatnonzero(np.nan_to_num(self.sizes[kind]) > 0)
        return SizeRows(self.features[at], FEATURES, self.sizes[kind][at], self.projects[at])


def collect(store: Store, functions: Iterable[Mapping[str, Any]]) -> SizeData:
    """Join what a run left in its store.

    Args:
        functions: rows of `functions.parquet`: module_id, name, project, language, norm_hash.

    Raises:
        ArtifactError: no function has both features and sizes.
    """
    features = {f.module: f for f in _outputs(store, "featurise", ModuleFeatures)}
    labels = {one.module: one for one in _outputs(store, "label", ModuleLabels)}
    seen: set[str] = set()
    columns: list[tuple[Any, ...]] = []
    positions: dict[str, dict[str, int]] = {}
    sizes: dict[str, dict[str, dict[str, int]]] = {}
    for row in functions:
        module = row["module_id"]
        if row["norm_hash"] in seen or module not in features or module not in labels:
            continue
        if module not in positions:
            positions[module] = {name: at for at, name in enumerate(features[module].names)}
            sizes[module] = {
                way.kind: dict(zip(way.names, way.sizes, strict=True))
                for way in labels[module].sizes
            }
        at = positions[module].get(row["name"])
        found = [sizes[module].get(kind, {}).get(row["name"], np.nan) for kind in ("Oz", "O2")]
        if at is None or np.isnan(found).all():
            continue
        seen.add(row["norm_hash"])
        columns.append((module, at, *found, row["project"], row["language"]))
    if not columns:
        raise ArtifactError(f"no function in {store.root} has both features and sizes")
    matrices = {module: features[module].matrix() for module in {c[0] for c in columns}}
    return SizeData(
        np.stack([matrices[c[0]][c[1]] for c in columns]),
        {
            kind: np.array([c[2 + at] for c in columns], float)
            for at, kind in enumerate(("Oz", "O2"))
        },
        np.array([c[4] for c in columns]),
        np.array([c[5] for c in columns]),
    )


def _outputs(store: Store, stage: str, kind: type[Any]) -> Iterator[Any]:
    for row in store.done(stage):
        yield decode(store.get(row.output), kind)


def save(data: SizeData, path: Path) -> None:
    """Write as one compressed numpy file, without objects."""
    np.savez_compressed(
        path,
        features=data.features.astype(np.float32),
        oz=data.sizes["Oz"],
        o2=data.sizes["O2"],
        projects=data.projects.astype(str),
        languages=data.languages.astype(str),
    )


def load(path: Path) -> SizeData:
    """Read what `save` wrote. Raises ArtifactError."""
    try:
        with np.load(path, allow_pickle=False) as told:
            return SizeData(
                told["features"],
                {"Oz": told["oz"], "O2": told["o2"]},
                told["projects"],
                told["languages"],
            )
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"size data {path} cannot be read: {error}") from error
