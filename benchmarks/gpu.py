"""Triton kernels against the best peer on a GPU, checked before they are timed.

    python benchmarks/gpu.py                    # all; writes results/gpu-<device>.json
    python benchmarks/gpu.py --only gemv        # cases whose name has this in it
    python benchmarks/gpu.py --dry-run          # tiny sizes in the interpreter, checks alone, no GPU

Before anything is timed, `pytest -m gpu` has to be green and every candidate's result near the
reference's; else the exit code is 1. Bandwidth is what the algorithm has to move over the median time,
and the ceiling is what copying a gibibyte reaches on the same card.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

DRY = "--dry-run" in sys.argv
os.environ["TRITON_INTERPRET"] = "1" if DRY else "0"  # decided when Triton is imported

import gpu_attention  # noqa: E402
import gpu_pointwise  # noqa: E402
import gpu_products  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from gpu_case import Case, Size, WrongNumbers, check, timed  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from timing import ROOT, machine, save_result  # noqa: E402

SECTIONS = (gpu_attention.cases, gpu_products.cases, gpu_pointwise.cases)
GATE = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:xdist", "tests/codegen")


def main() -> int:
    """Run, print and store. Returns the exit code."""
    arguments = _arguments()
    console = Console(width=arguments.width)
    torch.manual_seed(0)
    if not DRY:
        refusal = _refusal()
        if refusal:
            console.print(refusal, style="red", markup=False)
            return 1
    size = Size("cpu" if DRY else "cuda", tiny=DRY)
    try:
        with torch.no_grad():
            found = list(_results(size, arguments.only))
    except WrongNumbers as wrong:
        console.print(f"wrong: {wrong}", style="red", markup=False)
        return 1
    console.print(_table(found))
    if not DRY:
        device = re.sub(r"[^0-9A-Za-z]+", "-", torch.cuda.get_device_name()).strip("-").lower()
        console.print(f"{save_result(f'gpu-{device}', {**_machine(), 'kernels': found})}")
    return 0


def _refusal() -> str | None:
    """Why nothing can be timed here."""
    if not torch.cuda.is_available():
        return "no CUDA device; --dry-run checks every entry without one"
    gate = subprocess.run([sys.executable, *GATE], cwd=ROOT, capture_output=True, text=True)
    if gate.returncode != 0:
        return f"the gate is red: python {' '.join(GATE)}\n{gate.stdout[-2000:]}"
    return None


def _cases(size: Size, only: str) -> Iterator[Case]:
    for cases in SECTIONS:
        yield from (case for case in cases(size) if only in case.name)


def _results(size: Size, only: str) -> Iterator[dict[str, Any]]:
    ceiling = 0.0 if DRY else _copy_bandwidth()
    for case in _cases(size, only):
        told: dict[str, Any] = {"name": case.name, "shape": case.shape, "errors": check(case)}
        yield told if DRY else {**told, "copy_gb_per_s": ceiling / 1e9, **timed(case, ceiling)}


def _copy_bandwidth() -> float:
    """Bytes read and written a second when a gibibyte is copied."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2e3 * source.nbytes / milliseconds


def _machine() -> dict[str, Any]:
    card = torch.cuda.get_device_properties(0)
    return {
        **machine(torch.get_num_threads()),
        "gpu": card.name,
        "gpu_memory_gib": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _table(found: list[dict[str, Any]]) -> Table:
    columns = ("kernel", "shape", "error")
    timed_columns = () if DRY else ("us", "GB/s", "% of copy", "best peer", "speedup")
    table = Table(*columns, *timed_columns)
    for row in found:
        cells = [row["name"], row["shape"], f"{max(row['errors'].values()):.1e}"]
        if not DRY:
            ours = row["candidates"]["ours"]["p50_us"]
            cells += [f"{ours:.1f}", f"{row['gb_per_s']:.0f}", f"{row['percent_of_copy']:.0f}"]
            speedup = row["speedup_over_best_peer"]
            cells += [row["best_peer"] or "", f"{speedup:.2f}" if speedup else ""]
        table.add_row(*cells)
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, no GPU, checks alone")
    parser.add_argument("--width", type=int, default=140, help="columns of the table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
