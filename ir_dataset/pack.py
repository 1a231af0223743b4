"""The dataset as Parquet: ComPile's six columns first, then identity and provenance.

A directory of

    data/LANGUAGE/SPLIT-00000.parquet   one row a module, `content` is bitcode
    functions.parquet                   one row a function of a packed module: hashes, properties, sizes
    licenses.parquet                    licence texts by hash
    provenance.jsonl                    where each package came from, and what its build gave
    summary.json, audit.json            counts by stage and language; the leakage audit
    manifest.json                       SHA-256 of every file

Rows are sorted and no time is written, so the same objects give the same bytes.

Source of the first six columns: https://huggingface.co/datasets/llvm-ml/ComPile
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from ir_dataset.records import Record
from ir_dataset.store import Store

__all__ = [
    "MODULE_COLUMNS",
    "FunctionRow",
    "ModuleRow",
    "write_functions",
    "write_licenses",
    "write_modules",
]

ROW_GROUP = 256
SHARD_BYTES = 500_000_000
"""Bitcode in one file, as in ComPile."""


class ModuleRow(Record, frozen=True):
    """A packed module less its bitcode."""

    license_expression: str
    license_source: str
    license_files: tuple[str, ...]
    package_source: str
    language: str
    module_id: str
    struct_hash: str
    norm_hash: str
    package: str
    version: str
    project: str
    source_path: str
    source_sha256: str
    archive_sha256: str
    build_system: str
    compiler: str
    llvm_version: str
    target_triple: str
    arguments: tuple[str, ...]
    opt_level_requested: str
    forced_o2: bool
    stage: str
    dropped_flags: tuple[str, ...]
    n_functions: int
    n_instructions: int
    n_tokens_bpe: int | None
    """None where the module is not of the sample that was counted."""
    n_text_chars: int
    reader_ok: bool
    license_tier: str
    split: str
    dup_count: int


class FunctionRow(Record, frozen=True):
    """A function of a packed module."""

    module_id: str
    name: str
    language: str
    project: str
    fn_hash: str
    norm_hash: str
    cluster_id: int
    n_instructions: int
    n_blocks: int
    split: str
    """`train`, `validation`, `test`, `ood`; empty where it is left out since its like is elsewhere."""
    duplicate: bool
    """True where a function with the same `norm_hash` came earlier."""


def _types() -> dict[str, Any]:
    import pyarrow as pa

    texts = {name: pa.string() for name in ModuleRow.__struct_fields__}
    lists = dict.fromkeys(("license_files", "arguments", "dropped_flags"), pa.list_(pa.string()))
    counts = dict.fromkeys(
        (
            "n_functions",
            "n_instructions",
            "n_tokens_bpe",
            "n_text_chars",
            "dup_count",
        ),
        pa.int64(),
    )
    flags = dict.fromkeys(("forced_o2", "reader_ok"), pa.bool_())
    return {"content": pa.binary()} | texts | lists | counts | flags


MODULE_COLUMNS = ("content", *ModuleRow.__struct_fields__)
"""Columns of the module files, in order."""


def write_modules(directory: Path, store: Store, rows: Iterable[ModuleRow]) -> list[str]:
    """Write `data/LANGUAGE/SPLIT-N.parquet`; returns the names, relative to the directory.

    Raises:
        ArtifactError: a module is not in the store, or damaged.
    """
    import pyarrow as pa

    types = _types()
    schema = pa.schema([(name, types[name]) for name in MODULE_COLUMNS])
    written = []
    ordered = sorted(rows, key=lambda row: (row.language, row.split, *_order(row)))
    for (language, split), group in groupby(ordered, lambda row: (row.language, row.split)):
        for number, shard in enumerate(_shards(store, list(group))):
            name = f"data/{language}/{split}-{number:05d}.parquet"
            _write(directory / name, schema, _tables(shard, store, schema))
            written.append(name)
    return written


def _order(row: ModuleRow) -> tuple[str, ...]:
    return (row.project, row.package, row.source_path, row.module_id)


def _shards(store: Store, rows: Sequence[ModuleRow]) -> Iterator[list[ModuleRow]]:
    shard: list[ModuleRow] = []
    size = 0
    for row in rows:
        bytes_ = store.path(row.module_id).stat().st_size
        if shard and size + bytes_ > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(row)
        size += bytes_
    yield shard


def _tables(rows: Sequence[ModuleRow], store: Store, schema: Any) -> Iterator[Any]:
    import pyarrow as pa

    for start in range(0, len(rows), ROW_GROUP):
        values = [
            {"content": store.get(row.module_id), **msgspec.to_builtins(row)}
            for row in rows[start : start + ROW_GROUP]
        ]
        yield pa.Table.from_pylist(values, schema=schema)


def _write(path: Path, schema: Any, tables: Iterable[Any]) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=True) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=ROW_GROUP)


def write_functions(
    path: Path,
    rows: Sequence[FunctionRow],
    numbers: Mapping[str, Any],
    embeddings: Any = None,
) -> None:
    """Write the child table of functions.

    Args:
        numbers: further columns, arrays as long as `rows`: properties and labels; NaN is null.
        embeddings: float32 array [functions, width], the `ir2vec` column, or None.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        "cluster_id": pa.int64(),
        "n_instructions": pa.int64(),
        "n_blocks": pa.int64(),
        "duplicate": pa.bool_(),
    }
    columns: dict[str, Any] = {
        name: pa.array([getattr(row, name) for row in rows], types.get(name, pa.string()))
        for name in FunctionRow.__struct_fields__
    }
    for name, values in numbers.items():
        columns[name] = pa.array(values, pa.float32(), from_pandas=True)
    if embeddings is not None:
        width = embeddings.shape[1]
        columns["ir2vec"] = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), width)
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=1 << 16)


def write_labels(path: Path, rows: Sequence[tuple[str, str, str, float, str, str]]) -> None:
    """Write labels: module, function, kind, value, unit and the tools that measured it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("module_id", "name", "kind", "value", "unit", "tools")
    types = [pa.float64() if name == "value" else pa.string() for name in names]
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    arrays = [pa.array(column, type_) for column, type_ in zip(columns, types, strict=True)]
    pq.write_table(pa.table(arrays, names=list(names)), path, compression="zstd")


def write_licenses(path: Path, store: Store, texts: Mapping[str, str]) -> None:
    """Write licence texts: `texts` is the SPDX expression, or what is known, by the text's hash."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shas = sorted(texts)
    table = {
        "sha256": shas,
        "spdx": [texts[sha] for sha in shas],
        "text": [store.get(sha).decode("utf-8", "replace") for sha in shas],
    }
    schema = pa.schema([("sha256", pa.string()), ("spdx", pa.string()), ("text", pa.string())])
    pq.write_table(pa.Table.from_pydict(table, schema=schema), path, compression="zstd")
