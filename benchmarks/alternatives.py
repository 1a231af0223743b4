"""How long whole alternatives of a site take, and how well a model of them decides.

    python benchmarks/alternatives.py measure --threads 2    # one file for each number of threads
    python benchmarks/alternatives.py train                  # the model that comes with the package
    python benchmarks/alternatives.py evaluate               # over five seeds, from the files

`measure` compares every way with its reference before anything is timed. The ways of a site take turns, and
go through a pool of memory; the whole is done twice, so that what learns from one pass is judged by the
other. The evaluation goes to benchmarks/results/alternatives.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from alternative_cases import Pool, Site, sites
from rich.console import Console
from rich.table import Table
from timing import machine, save_result

from ir_dataset.cost_models import alternatives, alternatives_data
from ir_dataset.cost_models.alternatives_evaluate import evaluate
from ir_dataset.cost_models.measure import fingerprint
from rewriter.cost.roofline import Ceilings
from rewriter.cost.work import SIZES

DATA = Path(alternatives_data.__file__).parent / "data"
MODELS = Path(alternatives_data.__file__).parent / "models"
FEWEST, MOST, BUDGET, PATIENCE = 6, 40, 0.15, 1.0
"""Turns of a site in one pass; the seconds it may take between them, and where others disturb it."""
AGREED = 1.1
"""Factor within which even and odd turns have to agree, else it goes on while patience lasts."""
SHOWN = (
    "correct",
    "slowdown",
    "slowdown_max",
    "unsure",
    "correct_where_sure",
    "as_used",
    "covered",
)


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    ways: dict[str, Callable[[argparse.Namespace], int]] = {
        "measure": _measure,
        "train": _train,
        "evaluate": _evaluate,
    }
    return ways[arguments.do](arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=("measure", "train", "evaluate"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mebibytes", type=int, default=512, help="of the pool, in fp32")
    parser.add_argument("--only", default="", help="sites with this in their name")
    parser.add_argument("--out", type=Path, help="of measure")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=110)
    return parser.parse_args()


# --- measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def _measure(arguments: argparse.Namespace) -> int:
    torch.manual_seed(0)
    ceilings = Ceilings.here()  # the same for every part of what is measured
    chosen = [s for s in sites(Pool(arguments.mebibytes)) if arguments.only in s.name]
    wrong = [error for site in chosen for case in site.cases if (error := case.error())]
    if wrong:
        print("not timed:", *wrong, sep="\n", file=sys.stderr)
        return 1
    begun = time.perf_counter()
    passes = [[_timed(site) for site in chosen] for _ in range(2)]
    print(f"checked, then measured in {time.perf_counter() - begun:.0f} s")
    rows = [
        _row(site, number, [found[at][number] for found in passes], arguments.threads)
        for at, site in enumerate(chosen)
        for number in range(len(site.cases))
    ]
    out = arguments.out or DATA / f"alternatives_{arguments.threads}.parquet"
    told = {**fingerprint(), "torch": torch.__version__, "ceilings": json.dumps(asdict(ceilings))}
    alternatives_data.write(rows, told, out)
    print(f"{len(rows)} rows in {out}; {ceilings}")
    return 0


def _timed(site: Site) -> list[list[float]]:
    """Seconds of each turn, by case; one turn before that is not counted."""
    found: list[list[float]] = [[] for _ in site.cases]
    begun = time.perf_counter()
    for turn in range(MOST + 1):
        for seconds, case in zip(found, site.cases, strict=True):
            start = time.perf_counter()
            case.call(turn)
            seconds.append(time.perf_counter() - start)
        taken = time.perf_counter() - begun
        if turn >= FEWEST and (taken > PATIENCE or (taken > BUDGET and _agreed(found))):
            break
    return [seconds[1:] for seconds in found]


def _agreed(found: list[list[float]]) -> bool:
    """Whether the least of every other turn is about that of the turns between."""
    pairs = ((min(seconds[1::2]), min(seconds[2::2])) for seconds in found)
    return all(max(pair) < AGREED * min(pair) for pair in pairs)


def _row(site: Site, number: int, passes: list[list[float]], threads: int) -> dict[str, Any]:
    case = site.cases[number]
    work = case.work
    return {
        "site": site.name,
        "operator": work.operator,
        "backend": case.backend,
        "dtype": work.dtype,
        "weight_dtype": work.weight_dtype,
        "threads": threads,
        **{name: work.sizes.get(name, 0) for name in SIZES},
        **asdict(work.cost),
        **{f"seconds_{n}": min(seconds) for n, seconds in enumerate(passes, 1)},
        **{f"median_{n}": median(seconds) for n, seconds in enumerate(passes, 1)},
    }


# --- learning and judging ------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    data = alternatives_data.load()
    path = MODELS / "alternatives.json.gz"
    alternatives.LearnedModel.fit(data).save(path)
    print(f"{len(data.rows)} rows; {path}: {path.stat().st_size} bytes")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    data = alternatives_data.load()
    result = {
        "machine": {**data.machine, "threads": sorted(data.ceilings)},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": machine(arguments.threads)["commit"],
        "rows": evaluate(data, range(arguments.seeds)),
    }
    save_result("alternatives", result)
    table = Table(title="which of two alternatives is faster")
    for name in ("selector", "decision", "pairs", *SHOWN):
        table.add_column(name, justify="left" if name in ("selector", "decision") else "right")
    for row in result["rows"]:
        told = [f"{row[name]:.3f}" if row.get(name) is not None else "" for name in SHOWN]
        table.add_row(row["selector"], row["decision"], str(row["pairs"]), *told)
    Console(width=arguments.width).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
