"""Run times of the CPU families: every kernel is checked against numpy, then timed in interleaved passes.

    python -m ir_dataset.cost_models.measure ir_dataset/cost_models/data/cpu.parquet

A time is the least of at least three runs, and of as many as fit into the budget. Passes go through all
configurations of a shape in another order each, minutes apart: their difference is the noise floor. Where
a kernel has two speeds by chance, several rounds make a pass: `--only scan transpose --rounds 4` measures
these again and keeps the file's other families.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from codegen.cpp_kernels.compiler import compile_library, find_compiler, inline_headers
from ir_dataset.cost_models.cpu_families import FAMILIES
from ir_dataset.cost_models.cpu_loops import (
    CONFIGURATIONS,
    Arrays,
    Configuration,
    Family,
    Shape,
    body_name,
    make_arrays,
    source,
)
from rewriter import processor
from rewriter.errors import ConfigError, VerificationError

__all__ = ["KNOBS", "Runner", "fingerprint", "measure", "write"]

log = logging.getLogger(__name__)

KNOBS = ("rows", "unroll", "width", "block", "prefetch", "threads")
_TOLERANCE = 2e-3
"""Relative to the largest element: fp32 sums in another order, and exp by squaring (1e-3)."""


class _Pointers(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "bytes", "index", "out", "scratch")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth")),
    ]


class Runner:
    """A compiled family on the arrays of one shape."""

    def __init__(self, family: Family, shape: Shape, library: ctypes.CDLL | None = None) -> None:
        self.family, self.shape = family, shape
        self.library = library or compile_library(inline_headers(source(family)))
        self.library.least_seconds.restype = ctypes.c_double
        self.arrays: Arrays = make_arrays(shape)
        pointers = [array.ctypes.data for array in vars(self.arrays).values()]
        self._pointers = _Pointers(*pointers, shape.rows, shape.columns, shape.depth)
        self._items = (shape.columns, 64) if family.by_columns else (shape.rows, 8)

    def check(self, configuration: Configuration) -> None:
        """Raise VerificationError where the kernel's result is not numpy's."""
        self.arrays.out.fill(np.nan)
        self.library.run(*self._arguments(configuration))
        wanted = np.asarray(self.family.reference(self.arrays, self.shape)).ravel()
        found = self.arrays.out[: wanted.size]
        error = float(np.max(np.abs(found - wanted))) / max(float(np.max(np.abs(wanted))), 1e-30)
        if not error <= _TOLERANCE:
            told = f"{self.family.name} {self.shape} {configuration}"
            raise VerificationError(f"{told}: error {error:.2e}, allowed {_TOLERANCE}")

    def seconds(self, configuration: Configuration, budget_s: float) -> float:
        """Least seconds of one run."""
        found = self.library.least_seconds(
            *self._arguments(configuration), ctypes.c_double(budget_s)
        )
        return float(found)

    def _arguments(self, configuration: Configuration) -> tuple[Any, ...]:
        items, grain = map(ctypes.c_int64, self._items)
        body = getattr(self.library, body_name(configuration))
        return body, ctypes.byref(self._pointers), items, grain, configuration.threads


def measure(
    families: Iterable[Family] = tuple(FAMILIES.values()),
    configurations: tuple[Configuration, ...] = CONFIGURATIONS,
    *,
    passes: int = 2,
    rounds: int = 1,
    budget_s: float = 0.003,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Rows of family, shape, knobs and `seconds_1` to `seconds_<passes>`, each the least of its rounds.

    Raises:
        VerificationError: a kernel gave other numbers than numpy; nothing is timed then.
        ConfigError: no compiler.
    """
    families = tuple(families)
    runners: list[Runner] = []
    for family in families:
        library = compile_library(inline_headers(source(family)))
        for shape in family.shapes:
            runner = Runner(family, shape, library)
            for configuration in configurations:
                runner.check(configuration)
            runners.append(runner)
        log.info("%s: %d shapes are right", family.name, len(family.shapes))
    found: dict[tuple[int, Configuration], list[float]] = {}
    order = random.Random(seed)
    for number in range(passes * rounds):
        begun = time.perf_counter()
        for index in order.sample(range(len(runners)), len(runners)):
            for configuration in order.sample(configurations, len(configurations)):
                seconds = runners[index].seconds(configuration, budget_s)
                found.setdefault((index, configuration), []).append(seconds)
        log.info("round %d took %.0f s", number + 1, time.perf_counter() - begun)
    for (index, configuration), seconds in sorted(found.items(), key=lambda item: item[0]):
        runner = runners[index]
        yield {
            "family": runner.family.name,
            **{f"shape_{name}": size for name, size in vars(runner.shape).items()},
            **configuration.as_dict(),
            **{f"seconds_{n + 1}": min(seconds[n::passes]) for n in range(passes)},
        }


def fingerprint() -> dict[str, str]:
    """The machine and its compiler, as far as run times depend on them."""
    told = processor.values("cpu MHz", "cache size", "processor")
    compiler = find_compiler()
    return {
        "processor": processor.name(),
        "megahertz": "".join(told["cpu MHz"][:1]),
        "cache": "".join(told["cache size"][:1]),
        "cores": str(len(told["processor"])),
        "compiler": compiler.version if compiler else "",
    }


def write(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write rows as Parquet, with the machine's fingerprint in its metadata; fp32 seconds."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(list(rows))
    for position, name in enumerate(table.column_names):
        kind = pa.float32() if name.startswith("seconds") else pa.int32()
        if name != "family":
            table = table.set_column(position, name, table.column(name).cast(kind))
    table = table.replace_schema_metadata(fingerprint())
    parquet.write_table(table, path, compression="zstd", compression_level=19)


def main() -> None:
    """Measure all families and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--budget-ms", type=float, default=3.0)
    parser.add_argument("--only", nargs="*", choices=sorted(FAMILIES), default=None)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    families = [FAMILIES[name] for name in chosen.only or FAMILIES]
    kept = _others(chosen.out, set(chosen.only)) if chosen.only and chosen.out.is_file() else []
    measured = measure(
        families, passes=chosen.passes, rounds=chosen.rounds, budget_s=chosen.budget_ms / 1e3
    )
    write([*kept, *measured], chosen.out)


def _others(path: Path, names: set[str]) -> list[dict[str, Any]]:
    """Rows of the families that are not measured again. Raises ConfigError: from another machine."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    there = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    here = fingerprint()
    differ = [name for name in here if there.get(name) != here[name]]
    if differ:
        told = ", ".join(f"{name} is {here[name]}" for name in differ)
        raise ConfigError("out", str(path), f"measured on this machine ({told})")
    return [row for row in table.to_pylist() if row["family"] not in names]


if __name__ == "__main__":
    main()
