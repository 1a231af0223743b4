"""A dataset as ComPile ships its own: six columns, files named `train-N`, nothing else.

What reads ComPile reads these: the columns have its names, order and types, and every module that is
packed is in them, whatever set it belongs to here, since ComPile has one set.

Source: https://huggingface.co/datasets/llvm-ml/ComPile
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ir_dataset.pack import ROW_GROUP
from rewriter.errors import ArtifactError
from rewriter.export.directory import check_target, replaced, write_json

__all__ = ["COMPILE_COLUMNS", "export_compile"]

COMPILE_COLUMNS = (
    *("content", "license_expression", "license_source", "license_files"),
    *("package_source", "language"),
)


def export_compile(dataset: Path, output: Path) -> dict[str, int]:
    """Write `data/LANGUAGE/train-00000.parquet`, one file a language; returns modules by language.

    The directory appears whole or not at all, and one that an export wrote before is replaced.

    Raises:
        ArtifactError: `dataset` has no module tables, or `output` holds something else or is inside it.
    """
    folders = sorted(path for path in (dataset / "data").glob("*") if path.is_dir())
    if not folders:
        raise ArtifactError(f"{dataset} has no data/LANGUAGE directories: not a dataset")
    if dataset.resolve() in (output.resolve(), *output.resolve().parents):
        raise ArtifactError(f"{output} is inside the dataset; allowed: a directory beside it")
    check_target(output)
    with replaced(output) as place:
        counts = {folder.name: _export(folder, place / "data" / folder.name) for folder in folders}
        write_json(place / "manifest.json", {"format": "compile", "modules": counts})
    return counts


def _export(folder: Path, target: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    target.mkdir(parents=True)
    types = [pa.binary(), pa.string(), pa.string(), pa.list_(pa.string()), pa.string(), pa.string()]
    schema = pa.schema(list(zip(COMPILE_COLUMNS, types, strict=True)))
    count = 0
    with pq.ParquetWriter(target / "train-00000.parquet", schema, compression="zstd") as writer:
        for table in _tables(folder):
            writer.write_table(table.cast(schema), row_group_size=ROW_GROUP)
            count += len(table)
    return count


def _tables(folder: Path) -> Iterator[Any]:
    """Row groups one at a time: a language may have more bitcode than memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in sorted(folder.glob("*.parquet")):
        try:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns=list(COMPILE_COLUMNS))
        except (OSError, pa.ArrowException, KeyError) as error:
            raise ArtifactError(f"{path}: not a table of modules: {error}") from error
