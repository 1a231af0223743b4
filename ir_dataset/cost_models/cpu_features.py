"""What the ranking model sees of a CPU kernel: knobs, sizes, the level 0 bound and the machine code.

    python -m ir_dataset.cost_models.cpu_features ir_dataset/cost_models/data/cpu_code.parquet

The machine code is what this machine's compiler makes of each family and configuration; its features
are kept beside the measurements, so that learning needs no compiler.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegen.cpp_kernels.compiler import find_compiler
from ir_dataset.cost_models import assembly, work_terms
from ir_dataset.cost_models.cpu_families import FAMILIES
from ir_dataset.cost_models.cpu_loops import (
    CONFIGURATIONS,
    Configuration,
    Family,
    Shape,
    body_name,
    source,
)
from ir_dataset.cost_models.level0 import CPUS, cpu_seconds
from rewriter.errors import ConfigError

__all__ = ["CODE", "KERNEL", "NAMES", "code_rows", "configuration_features"]

KERNEL = (
    *("by_columns", "flops_per_element", "bytes_read", "bytes_written", "intensity"),
    *("log_rows", "log_columns", "log_depth", "log_bytes", "log_flops"),
)
"""The same for all configurations of a kernel and shape: what out-of-distribution is judged by."""
PLACES = ("row_bytes_of_page", "twos_of_columns", "twos_of_rows", "column_bytes_of_page")
"""Which lines of a cache rows and columns share: powers of two meet in a few of them."""
KNOBS = (
    *("rows", "unroll", "width", "block", "prefetch", "threads"),
    *("log_strip", "sums", "strips_in_row", "tiles_of_thread", "blocks", "log_share_bytes"),
    *("log_seconds", "block_bytes", "log_tile_bytes", "log_block_bytes"),
    *work_terms.MISSES,
)
CACHE_SETS = ((64, 12), (2048, 16))
"""Sets and ways of the first and second cache, with lines of 64 bytes."""
KNOWN_PAGES = 64
"""Pages of 4 KiB whose addresses a core has at hand."""
CODE = assembly.FEATURES
PER_ELEMENT = ("mca_per_element", "instructions_per_element", "log_mca_seconds")
NAMES = (*KERNEL, *PLACES, *KNOBS, *CODE, *PER_ELEMENT)
"""All features, in order."""


def configuration_features(
    family: Family, shape: Shape, configuration: Configuration, code: Mapping[str, float]
) -> dict[str, float]:
    """Features of one row, by the names of `NAMES`."""
    c, cells = configuration, shape.rows * shape.columns
    flops = family.flops * cells * shape.depth
    moved = cells * (family.read + family.written)
    if shape.depth > 1:
        moved = 4.0 * (cells + shape.rows * shape.depth + shape.columns * shape.depth)
    strip = c.unroll * c.width
    items = shape.columns if family.by_columns else shape.rows
    share = items / min(c.threads, max(items // (64 if family.by_columns else 8), 1))
    columns = share if family.by_columns else shape.columns
    rows = shape.rows if family.by_columns else share
    block = min(c.block or columns, columns)
    seconds = cpu_seconds(
        CPUS["avx512"],
        flops=flops,
        bytes_moved=moved,
        working_set=moved,
        threads=c.threads,
        lanes=c.width,
        chains=c.rows * c.unroll,
    )
    rounds = cells * shape.depth / (c.rows * strip) / c.threads
    busy = code["mca_cycles"] / CPUS["avx512"].hertz
    return {
        "by_columns": float(family.by_columns),
        "flops_per_element": family.flops,
        "bytes_read": family.read,
        "bytes_written": family.written,
        "intensity": flops / moved,
        "log_rows": np.log2(shape.rows),
        "log_columns": np.log2(shape.columns),
        "log_depth": np.log2(shape.depth),
        "log_bytes": np.log2(moved),
        "log_flops": np.log2(flops + 1),
        "row_bytes_of_page": float(shape.columns * 4 % 4096),
        "twos_of_columns": np.log2(shape.columns & -shape.columns),
        "twos_of_rows": np.log2(shape.rows & -shape.rows),
        "column_bytes_of_page": float(shape.rows * 4 % 4096),
        **{name: float(value) for name, value in configuration.as_dict().items()},
        "log_strip": np.log2(strip),
        "sums": float(c.rows * c.unroll),
        "strips_in_row": block / strip,
        "tiles_of_thread": rows / c.rows,
        "blocks": columns / block,
        "log_share_bytes": np.log2(moved / c.threads),
        "log_seconds": np.log2(seconds),
        "block_bytes": block * rows * 4.0,
        "log_tile_bytes": np.log2(block * c.rows * 4.0),
        "log_block_bytes": np.log2(block * rows * 4.0),
        **_misses(family, shape, lines=int(block), together=strip, threads=c.threads),
        **code,
        "mca_per_element": code["mca_cycles"] / (c.rows * strip),
        "instructions_per_element": code["loop_instructions"] / (c.rows * strip),
        "log_mca_seconds": np.log2(rounds * busy + 1e-7),
    }


def _misses(
    family: Family, shape: Shape, *, lines: int, together: int, threads: int
) -> dict[str, float]:
    """What stores that walk down columns miss: a block's lines have to stay until each is full.

    Args:
        lines: that one tile of rows writes to, one for each column. together: lines of one strip.
    """
    if not family.scattered:
        return dict.fromkeys(work_terms.MISSES, 0.0)
    apart = shape.rows * 4

    def sets(count: int, of: int) -> int:
        return len(np.unique(np.arange(count) * apart // 64 % of))

    ways = [*CACHE_SETS, *((of, ways / 2) for of, ways in CACHE_SETS)]  # half: the input wants some
    kept = [sets(lines, of) * ways / lines for of, ways in ways]
    kept.append(KNOWN_PAGES / max(lines * min(apart / 4096, 1.0), 1.0))
    on_a_set = together / sets(together, CACHE_SETS[0][0]) - 1.0
    border = shape.rows // 8 // 2 * 8  # where one thread's rows end and another's begin
    shared = min(16 / shape.rows, 1.0) if threads > 1 and border % 16 else 0.0
    told = (*(max(0.0, 1.0 - share) for share in kept), on_a_set, shared)
    return dict(zip(work_terms.MISSES, told, strict=True))


def code_rows(families: Mapping[str, Family] = FAMILIES) -> Iterator[dict[str, Any]]:
    """Family, name of the body, and `CODE` of what the compiler makes of it.

    Raises:
        ConfigError: no compiler, or no llvm-mca.
    """
    for family in families.values():
        loops = assembly.busiest_loops(_assembly(family))
        simulated = assembly.cycles({name: loop for name, (loop, _) in loops.items() if loop})
        for name in sorted({body_name(c) for c in CONFIGURATIONS}):
            loop, whole = loops[name]
            none = {"mca_cycles": 0.0, "mca_uops": 0.0}
            counted = {**assembly.count_loop(loop, whole), **simulated.get(name, none)}
            yield {"family": family.name, "body": name, **{n: counted[n] for n in CODE}}


def _assembly(family: Family) -> str:
    compiler = find_compiler()
    if compiler is None:
        raise ConfigError("CXX", None, "a C++ compiler, whose assembly is read")
    flags = "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    command = [
        compiler.path,
        *flags.split(),
        "-fno-signed-zeros",
        "-S",
        "-x",
        "c++",
        "-o",
        "-",
        "-",
    ]
    text = source(family, driver=False)
    run = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return run.stdout


def main(path: Path) -> None:
    """Write the features of all families' machine code."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(list(code_rows()))
    parquet.write_table(table, path, compression="zstd", compression_level=19)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
