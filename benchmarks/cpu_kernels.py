"""Kernels for the CPU against the bandwidth of plain reading, and against PyTorch, in one run.

    python benchmarks/cpu_kernels.py                 # all sections
    python benchmarks/cpu_kernels.py --only gemv     # one of them

Every candidate's result is checked first, and nothing is timed where one is wrong: the exit code is 1.
All candidates of a case and the loops that only read run in turns (A, B, C, A, B, C, ...). The exit
code is 2 where a kernel misses its target share of the bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cpu_kernels import (
    column_sums,
    decode_attention,
    gathered_mlp,
    gemv,
    page_scores,
    pointwise,
    prefill_attention,
    shared_prefix,
)
from cpu_kernels.case import Case, Measured, WrongNumbers, measure
from rich.console import Console
from rich.table import Table
from timing import RESULTS, machine, save_result

from codegen.cpp_kernels.compiler import find_compiler

SECTIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "gemv": gemv.cases,
    "gathered_mlp": gathered_mlp.cases,
    "decode_attention": decode_attention.cases,
    "shared_prefix": shared_prefix.cases,
    "page_scores": page_scores.cases,
    "column_sums": column_sums.cases,
    "prefill_attention": prefill_attention.cases,
    "pointwise": pointwise.cases,
}


def main() -> int:
    """Run, print and store. Returns the exit code."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    console = Console(width=arguments.width)
    measured: dict[str, list[Measured]] = {}
    try:
        with torch.no_grad():
            for name in arguments.only or SECTIONS:
                cases = SECTIONS[name]()
                measured[name] = [measure(c, arguments.rounds, arguments.threads) for c in cases]
                console.print(_table(name, measured[name]))
    except WrongNumbers as error:
        console.print(f"[red]not timed: {error}")
        return 1
    if not arguments.no_save:
        _save(measured, arguments.threads)
    missed = [m for rows in measured.values() for m in rows if not m.met]
    for m in missed:
        console.print(f"[red]{m.case.kernel} {m.case.name}: below {m.case.target:.0%} of reading")
    return 2 if missed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="these sections")
    parser.add_argument("--rounds", type=int, default=21, help="turns of every candidate")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--width", type=int, default=None, help="columns of the table")
    parser.add_argument("--no-save", action="store_true", help="leave the results' file alone")
    return parser.parse_args()


def _table(name: str, rows: list[Measured]) -> Table:
    columns = (
        "case",
        "candidate",
        "p50 ms",
        "min ms",
        "GB/s at min",
        "of read",
        "time of first",
        "error",
    )
    table = Table(*columns, title=f"{name}: reading is the best plain loop over as many bytes")
    for row in rows:
        for i, (candidate, sample) in enumerate(zip(row.case.candidates, row.samples, strict=True)):
            table.add_row(
                row.case.name if i == 0 else f"  read {row.read_gb_s:.1f} GB/s" if i == 1 else "",
                candidate.name,
                f"{sample.p50:.3f}",
                f"{sample.least:.3f}",
                f"{row.gb_s(i):.1f}",
                f"{row.gb_s(i) / row.read_gb_s:.0%}",
                f"{sample.least / row.samples[0].least:.2f}",
                f"{row.errors[i]:.0e}",
                style="" if i or row.met else "red",
                end_section=i == len(row.samples) - 1,
            )
    return table


def _save(measured: dict[str, list[Measured]], threads: int) -> None:
    """Sections that were not run keep what an earlier run found, with the machine it ran on."""
    path = RESULTS / "cpu-kernels.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    compiler = find_compiler()
    for name, rows in measured.items():
        told = {**machine(threads), "compiler": compiler.version if compiler else ""}
        result[name] = {"machine": told, "cases": [row.as_dict() for row in rows]}
    save_result("cpu-kernels", result)


if __name__ == "__main__":
    sys.exit(main())
