"""The measurements of the CPU families that come with the package, as groups to learn from.

Models learn from `cpu.parquet`. A second machine was measured on twice as many shapes, `SECOND_MACHINE`: by
it is judged what they know about a machine that they have not seen.

Rows beside the kernel's own features carry what other shapes of the same family, and other families,
measured for the same configuration, and what a sum over the work done makes of them (`work_terms`).
Those come from what is learned from alone: a row's own group is left out, so that training sees them as
they will be when a shape is new.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ir_dataset.cost_models import work_terms
from ir_dataset.cost_models.cpu_families import FAMILIES
from ir_dataset.cost_models.cpu_features import CODE, KERNEL, NAMES, configuration_features
from ir_dataset.cost_models.cpu_loops import DEFAULT, Configuration, Shape, body_name
from ir_dataset.cost_models.measure import KNOBS
from ir_dataset.cost_models.ranking import Floats, Groups
from rewriter.errors import ArtifactError

__all__ = ["PRIORS", "SECOND_MACHINE", "CpuData", "load", "with_priors"]

_DATA = Path(str(resources.files("ir_dataset.cost_models"))) / "data"
SECOND_MACHINE = _DATA / "cpu_2100mhz.parquet"
PRIORS = ("near_shapes", "all_shapes", "other_families", "work", "work_beside_best")
_NEAR = 1.0
"""Distance in log2 of the sizes at which a known shape counts by exp(-1/2)."""


@dataclass(frozen=True)
class CpuData:
    """Measured groups.

    Attributes:
        groups: seconds are the least of the first half of the passes.
        last: [rows], the least of the other half. families: [rows], numbers in the order of names.
        default: [rows], True at the default configuration.
        digest: sha256 of the files.
        family_names: by number. shapes: family and shape of each group.
        machine: fingerprint of where it was measured.
    """

    groups: Groups
    last: Floats
    families: NDArray[np.int64]
    default: NDArray[np.bool_]
    digest: str
    family_names: tuple[str, ...]
    shapes: dict[int, tuple[str, Shape]]
    machine: dict[str, str]


def load(measured: Path | None = None, code: Path | None = None) -> CpuData:
    """Read measurements and machine code features.

    Raises:
        ArtifactError: a file is missing, or a family, shape or body is in one of them alone.
    """
    from pyarrow import parquet

    measured, code = measured or _DATA / "cpu.parquet", code or _DATA / "cpu_code.parquet"
    try:
        table = parquet.read_table(measured)
        known = parquet.read_table(code).to_pylist()
        digest = hashlib.sha256(measured.read_bytes() + code.read_bytes()).hexdigest()
    except OSError as error:
        raise ArtifactError(f"measurements cannot be read: {error}") from error
    counted = {(row["family"], row["body"]): row for row in known}
    names = sorted(set(table.column("family").to_pylist()))
    features, groups, families, default = [], [], [], []
    numbers: dict[tuple[str, Shape], int] = {}
    for row in table.to_pylist():
        shape = Shape(*(row[f"shape_{name}"] for name in ("rows", "columns", "depth")))
        configuration = Configuration(**{name: row[name] for name in KNOBS})
        found = counted.get((row["family"], body_name(configuration)))
        if found is None or row["family"] not in FAMILIES:
            raise ArtifactError(f"{code} lacks {row['family']} {body_name(configuration)}")
        told = {name: found[name] for name in CODE}
        values = configuration_features(FAMILIES[row["family"]], shape, configuration, told)
        features.append([values[name] for name in NAMES])
        groups.append(numbers.setdefault((row["family"], shape), len(numbers)))
        families.append(names.index(row["family"]))
        default.append(configuration == DEFAULT)
    passes = [n for n in table.column_names if n.startswith("seconds_")]
    seconds = np.stack([table.column(n).to_numpy().astype(float) for n in passes])
    half = len(passes) // 2
    return CpuData(
        Groups(np.array(features), NAMES, np.array(groups), seconds[:half].min(0)),
        seconds[half:].min(0),
        np.array(families),
        np.array(default),
        digest,
        tuple(names),
        {number: kernel for kernel, number in numbers.items()},
        {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()},
    )


def with_priors(train: Groups, test: Groups) -> tuple[Groups, Groups]:
    """Both with `PRIORS` beside their columns; see the module."""
    return _joined(train, train), _joined(test, train)


def _joined(rows: Groups, known: Groups) -> Groups:
    priors = np.full((len(rows.groups), len(PRIORS)), np.nan)
    told = work_terms.predicted_logs(rows, known, (*KERNEL[:4], *KNOBS))
    catalogue = _Catalogue(known)
    for group in np.unique(rows.groups):
        at = np.flatnonzero(rows.groups == group)
        priors[at, :3] = catalogue.priors(rows.features[at], int(group))
        own = told[at]
        if np.isfinite(own).any():
            priors[at, 3], priors[at, 4] = own - np.nanmean(own), own - np.nanmin(own)
    features = np.hstack([rows.features, priors])
    return Groups(features, (*rows.names, *PRIORS), rows.groups, rows.seconds)


class _Catalogue:
    """Centred log times of known groups by configuration, with families told apart by their features."""

    def __init__(self, known: Groups) -> None:
        names = known.names
        self.knobs = [names.index(name) for name in KNOBS]
        self.sizes = [names.index(n) for n in ("log_rows", "log_columns", "log_depth")]
        self.kind = [names.index(n) for n in KERNEL[:4]]
        self.settings, number = np.unique(
            known.features[:, self.knobs], axis=0, return_inverse=True
        )
        self.groups = np.unique(known.groups)
        self.times = np.full((len(self.groups), len(self.settings)), np.nan)
        at = np.searchsorted(self.groups, known.groups)
        self.times[at, number.ravel()] = known.centred()
        first = np.unique(at, return_index=True)[1]
        self.where = known.features[first][:, self.sizes]
        self.kinds = known.features[first][:, self.kind]

    def priors(self, features: Floats, group: int) -> Floats:
        """[rows, 3] of one group: the first of PRIORS; NaN where nothing is known."""
        own = self.groups == group
        same = (self.kinds == features[0, self.kind]).all(1) & ~own
        other = ~(self.kinds == features[0, self.kind]).all(1)
        apart = ((self.where - features[0, self.sizes]) ** 2).sum(1)
        near = np.exp(-apart / (2 * _NEAR**2)) * same
        columns = [_position(self.settings, row) for row in features[:, self.knobs]]
        found = np.stack([self._mean(weight) for weight in (near, same * 1.0, other * 1.0)], 1)
        return found[columns]

    def _mean(self, weight: Floats) -> Floats:
        known = ~np.isnan(self.times)
        total = (weight[:, None] * known).sum(0)
        summed = (weight[:, None] * np.where(known, self.times, 0.0)).sum(0)
        return np.where(total > 0, summed / np.maximum(total, 1e-300), np.nan)


def _position(settings: Floats, row: Floats) -> int:
    found = np.flatnonzero((settings == row).all(1))
    return int(found[0]) if len(found) else -1
