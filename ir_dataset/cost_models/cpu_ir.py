"""Features of the CPU families' unoptimised IR: what ties their run times to what a corpus teaches.

    python -m ir_dataset.cost_models.cpu_ir ir_dataset/cost_models/data/cpu_ir.parquet

A body's IR is written as a corpus' is, before LLVM's first pass, and read the same way. The features are
kept beside the measurements, so that learning needs no compiler.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ir_dataset.cost_models.cpu_families import FAMILIES
from ir_dataset.cost_models.cpu_loops import CONFIGURATIONS, Family, body_name, source
from ir_dataset.extract.hook import unoptimised
from ir_dataset.features import FEATURES, function_features
from ir_dataset.ir_text import parse_module
from ir_dataset.reader import read_module
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ArtifactError

__all__ = ["ir_rows", "load"]

Key = tuple[str, str]
"""Family and name of the body."""


def ir_rows(
    families: Mapping[str, Family] = FAMILIES,
) -> Iterator[tuple[Key, NDArray[np.float32]]]:
    """`FEATURES` of each body of each family.

    Raises:
        ConfigError: no clang. ArtifactError: what it wrote cannot be read.
    """
    for name, family in families.items():
        module = parse_module(_text(family))
        wanted = {body_name(c) for c in CONFIGURATIONS}
        for function, row in zip(module.functions, function_features(module), strict=True):
            if function.name in wanted:
                yield (name, function.name), row


def _text(family: Family) -> str:
    compiler = Toolchain.find().need_c_compiler()
    command = [*unoptimised(compiler, cxx=True), "-x", "c++", "-o", "-", "-"]
    text = source(family, driver=False).encode()
    run = subprocess.run(command, input=text, capture_output=True, check=True)
    reading = read_module(run.stdout, writer_llvm="", allow_newer=True)
    if reading.reason:
        raise ArtifactError(f"IR of {family.name} cannot be read: {reading.reason}")
    return reading.text


def load(path: Path | None = None) -> dict[Key, NDArray[np.float32]]:
    """What `main` wrote. Raises ArtifactError: no such file, or of other features."""
    from pyarrow import parquet

    folder = Path(str(resources.files("ir_dataset.cost_models"))) / "data"
    path = path or folder / "cpu_ir.parquet"
    try:
        table = parquet.read_table(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if tuple(table.column_names) != ("family", "body", *FEATURES):
        raise ArtifactError(f"{path} has other features: write it again")
    keys = zip(table["family"].to_pylist(), table["body"].to_pylist(), strict=True)
    values = np.stack([table[name].to_numpy() for name in FEATURES], 1)
    return dict(zip(keys, values, strict=True))


def main(path: Path) -> None:
    """Write the features of all bodies' IR."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = dict(ir_rows())
    values = np.stack(list(rows.values()))
    columns = {"family": [family for family, _ in rows], "body": [body for _, body in rows]}
    numbers = {name: values[:, at] for at, name in enumerate(FEATURES)}
    table = pa.table({**columns, **numbers})
    parquet.write_table(table, path, compression="zstd", compression_level=19)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
