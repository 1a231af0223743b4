"""Functions of a packed dataset with their features and sizes, one of each kind, for the size models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ir_dataset.cost_models.size import KINDS, Floats, SizeRows
from ir_dataset.features import FEATURES
from rewriter.errors import ArtifactError

__all__ = ["SizeData", "read"]

NUMBERS = tuple(f"feature_{name}" for name in FEATURES)
SIZES = {kind: f"size_{kind.lower()}" for kind in KINDS}


@dataclass(frozen=True)
class SizeData:
    """Functions, one of each normalised hash, that have features and a size of some kind.

    Attributes:
        features: float32 [rows, FEATURES].
        sizes: by kind, of those the dataset has: [rows], bytes; NaN where a function is gone or unlabelled.
        projects, splits: [rows]; a split is empty where another set has the function too.
        digest: sha256 of the table of functions.
    """

    features: NDArray[np.float32]
    sizes: Mapping[str, Floats]
    projects: NDArray[Any]
    splits: NDArray[Any]
    digest: str

    def known(self, kind: str, split: str | None = None) -> NDArray[np.intp]:
        """Positions of the functions that have a size of a kind, in one set or in all."""
        wanted = np.nan_to_num(self.sizes[kind]) > 0
        return np.flatnonzero(wanted if split is None else wanted & (self.splits == split))

    def rows(self, kind: str, split: str | None = None) -> SizeRows:
        """Those functions, to learn from or to be judged by."""
        at = self.known(kind, split)
        return SizeRows(self.features[at], FEATURES, self.sizes[kind][at], self.projects[at])


def read(dataset: Path) -> SizeData:
    """The functions of a dataset that `rewriter ir run` wrote.

    Raises:
        ArtifactError: it has no table of functions, or one without features or sizes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = dataset / "functions.parquet"
    try:
        there = set(pq.read_schema(path).names)
        kinds = [kind for kind in KINDS if SIZES[kind] in there]
        wanted = ["project", "split", "duplicate", *(SIZES[kind] for kind in kinds), *NUMBERS]
        table = pq.read_table(path, columns=wanted)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{path}: not a table of functions: {error}") from error
    if len(table.column_names) != len(wanted):
        lacks = sorted(set(wanted) - set(table.column_names))
        raise ArtifactError(f"{path}: without the columns {', '.join(lacks[:3])}")
    sizes = {kind: table[SIZES[kind]].to_numpy().astype(float) for kind in kinds}
    sized = np.zeros(len(table), bool)
    for of_kind in sizes.values():
        sized |= np.nan_to_num(of_kind) > 0
    first = table[NUMBERS[0]].to_numpy()
    at = np.flatnonzero(sized & ~np.isnan(first) & ~table["duplicate"].to_numpy())
    return SizeData(
        np.stack([table[name].to_numpy()[at] for name in NUMBERS], 1),
        {kind: of_kind[at] for kind, of_kind in sizes.items()},
        np.array(table["project"].to_pylist(), str)[at],
        np.array(table["split"].to_pylist(), str)[at],
        digest,
    )
