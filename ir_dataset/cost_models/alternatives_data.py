"""Measured alternatives of sites, and which of them are decisions that a pass or a backend stands for."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rewriter.cost.cost import Cost
from rewriter.cost.roofline import Ceilings
from rewriter.cost.work import SIZES, Work
from rewriter.errors import ArtifactError

__all__ = ["DECISIONS", "AlternativesData", "Decision", "Row", "decisions", "load", "write"]

DECISIONS = ("int8 weights", "grouped heads", "bounded cache", "gathered neurons", "cpu, not eager")
"""What is decided: four rewrites, and the backend of an operator."""


@dataclass(frozen=True)
class Row:
    """One way to compute a site.

    Attributes:
        site: name of what may be computed in its ways. shape: the same without dtype or rows, which
            is held out as one.
        threads: that computed it.
        seconds: the least of one pass. judged: the least of the other pass.
    """

    site: str
    shape: str
    work: Work
    backend: str
    threads: int
    seconds: float
    judged: float


@dataclass(frozen=True)
class AlternativesData:
    """All that was measured on one machine.

    Attributes:
        ceilings: of the machine by number of threads. digest: sha256 of the files.
    """

    rows: tuple[Row, ...]
    ceilings: Mapping[int, Ceilings]
    machine: Mapping[str, str]
    digest: str

    def roofline(self, row: Row) -> float:
        """Seconds by the ceilings of its number of threads."""
        return self.ceilings[row.threads].seconds(row.work)


@dataclass(frozen=True)
class Decision:
    """Whether to put one way in the place of another; numbers of rows."""

    kind: str
    before: int
    after: int


def load(paths: Sequence[Path] | None = None) -> AlternativesData:
    """What comes with the package, or other files that benchmarks/alternatives.py wrote.

    Raises:
        ArtifactError: a file is missing, damaged, or lacks a column.
    """
    from pyarrow import ArrowException, parquet

    folder = Path(str(resources.files("ir_dataset.cost_models"))) / "data"
    paths = sorted(folder.glob("alternatives_*.parquet")) if paths is None else list(paths)
    rows, ceilings = list[Row](), dict[int, Ceilings]()
    machine, digest = dict[str, str](), hashlib.sha256()
    try:
        for path in paths:
            digest.update(path.read_bytes())
            table = parquet.read_table(path)
            machine = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
            limits = Ceilings(**json.loads(machine.pop("ceilings")))
            ceilings[limits.threads] = limits
            rows += [_row(row) for row in table.to_pylist()]
    except (OSError, KeyError, TypeError, ValueError, ArrowException) as error:
        raise ArtifactError(f"measured alternatives cannot be read: {error!r}") from error
    if not rows:
        raise ArtifactError("measured alternatives cannot be read: there are none")
    return AlternativesData(tuple(rows), ceilings, machine, digest.hexdigest())


def write(rows: Iterable[Mapping[str, Any]], told: Mapping[str, str], path: Path) -> None:
    """As Parquet, the machine in its metadata; times and costs as fp32."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist([dict(row) for row in rows])
    for at, column in enumerate(table.columns):
        if pa.types.is_floating(column.type):
            table = table.set_column(at, table.column_names[at], column.cast(pa.float32()))
    parquet.write_table(table.replace_schema_metadata(dict(told)), path, compression="zstd")


def decisions(rows: Sequence[Row]) -> Iterator[Decision]:
    """Every pair of ways of a site that a rewrite or a backend exchanges for one another."""
    by_site = defaultdict[tuple[str, int], list[int]](list)
    for number, row in enumerate(rows):
        by_site[(row.site, row.threads)].append(number)
    for numbers in by_site.values():
        for before in numbers:
            for after in numbers:
                if kind := _kind(rows[before], rows[after]):
                    yield Decision(kind, before, after)


def _kind(before: Row, after: Row) -> str:
    """Of `DECISIONS`; "" for what nothing puts in each other's place."""
    old, new = before.work, after.work
    if before.backend != after.backend:
        same = (old.operator, old.weight_dtype, old.sizes) == (
            new.operator,
            new.weight_dtype,
            new.sizes,
        )
        return DECISIONS[4] if same and before.backend == "eager" else ""
    if (old.operator, new.operator) == ("attention", "grouped_attention"):
        same = old.sizes == new.sizes and before.backend == "eager"
        return DECISIONS[1] if same else ""
    if new.operator == "streaming_attention" and old.operator in _DENSE:
        ungrouped = old.sizes["num_heads"] == old.sizes["num_kv_heads"]
        return DECISIONS[2] if ungrouped or old.operator == "grouped_attention" else ""
    if (old.operator, new.operator) == ("gated_mlp", "gathered_mlp"):
        return DECISIONS[3]
    narrower = old.operator == new.operator == "linear" and new.weight_dtype == "int8"
    return DECISIONS[0] if narrower and old.weight_dtype != "int8" else ""


_DENSE = ("attention", "grouped_attention")


def _row(row: Mapping[str, Any]) -> Row:
    sizes = {name: row[name] for name in SIZES if row[name]}
    cost = Cost(row["flops"], row["bytes_moved"], row["launches"])
    work = Work(row["operator"], cost, sizes, row["dtype"], row["weight_dtype"])
    kind, _, shape, *_ = row["site"].split(" ")
    seconds = row["seconds_1"], row["seconds_2"]
    return Row(row["site"], f"{kind} {shape}", work, row["backend"], row["threads"], *seconds)
