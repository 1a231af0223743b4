"""Tuning the project's own CPU kernels by measuring everything, and by measuring what a model picks.

    python benchmarks/tuning.py --threads 2

For each problem the model learned from the measurements of all other matrix sizes. Both ways compile,
check nothing twice and measure in caches of their own; then what they chose, and the default, are timed
against each other in turns. Results go to benchmarks/results/tuning.json. The exit code is 2 where the
model's way loses more than 2 % or measures more than 30 % of what the other does.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import machine, save_result

from codegen.cpp_kernels import gathered_mlp, gemv
from codegen.tuning import Choice, Problem, Ranked, Tuning, tuning
from ir_dataset.cost_models import own_kernels
from ir_dataset.cost_models.evaluate import mean_slowdown

ROUNDS = 30


def main() -> int:
    """Run, print and store. Returns the exit code."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    chosen = [p for p in own_kernels.problems() if re.search(arguments.only, p[0])]
    rankers = _rankers([name for name, _ in chosen])
    ways: dict[str, Callable[[str], Tuning]] = {
        "all": lambda name: Tuning("measure"),
        "model": lambda name: Tuning("measure", rankers[_size(name)], arguments.top_k),
    }
    found: dict[str, dict[str, Choice[Any]]] = {}
    taken: dict[str, float] = {}
    for way, make in ways.items():
        with _empty_cache():
            begun = time.perf_counter()
            found[way] = {name: _tuned(call, make(name)) for name, call in chosen}
            taken[way] = time.perf_counter() - begun
    rows = {name: _compared(call, found, name) for name, call in chosen}
    result = {
        "machine": machine(arguments.threads),
        **_summary(found, taken, rows),
        "problems": rows,
    }
    save_result("tuning", result)
    _print(Console(width=arguments.width), result)
    fine = result["loss"] <= 1.02 and result["measured_share"] <= 0.3
    return 0 if fine else 2


def _tuned(call: Callable[[], object], how: Tuning) -> Choice[Any]:
    with tuning(how):
        call()
    (choice,) = how.choices.values()
    return choice


def _compared(
    call: Callable[[], object], found: dict[str, dict[str, Choice[Any]]], name: str
) -> dict[str, Any]:
    """Least seconds of what each way chose, and of the default, in turns."""
    configs = {way: choices[name].config for way, choices in found.items()}
    configs["default"] = type(configs["all"])()
    least = dict.fromkeys(configs, float("inf"))
    for _ in range(ROUNDS):
        for way, config in configs.items():
            with tuning(Tuning("model", _fixed(config))):
                begun = time.perf_counter()
                call()
                least[way] = min(least[way], time.perf_counter() - begun)
    return {
        "microseconds": {way: seconds * 1e6 for way, seconds in least.items()},
        "configs": {way: str(config) for way, config in configs.items()},
        "reason": found["model"][name].reason,
    }


def _fixed(config: Any) -> Callable[..., Ranked]:
    def rank(problem: Problem, offered: Any, default: int) -> Ranked:
        return Ranked((list(offered).index(config),))

    return rank


def _rankers(names: list[str]) -> dict[str, own_kernels.SweepRanker]:
    """By size: a model that never saw it."""
    data = own_kernels.load()
    found = {}
    for size in {_size(name) for name in names}:
        known = [at for at, name in enumerate(data.names) if _size(name) != size]
        found[size] = own_kernels.SweepRanker(own_kernels.fit(data, known))
    return found


def _size(name: str) -> str:
    found = re.search(r"\d+x\d+", name)
    return found.group() if found else name


@contextmanager
def _empty_cache() -> Iterator[None]:
    """A cache directory of its own, and nothing loaded."""
    before = os.environ.get("REWRITER_CACHE")
    gemv._entry.cache_clear()
    gathered_mlp._entry.cache_clear()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REWRITER_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("REWRITER_CACHE")
            if before is not None:
                os.environ["REWRITER_CACHE"] = before


def _summary(
    found: dict[str, dict[str, Choice[Any]]], taken: dict[str, float], rows: dict[str, Any]
) -> dict[str, Any]:
    measured = {
        way: sum(len(c.seconds) for c in choices.values()) for way, choices in found.items()
    }
    times = {
        way: np.array([r["microseconds"][way] for r in rows.values()])
        for way in ("all", "model", "default")
    }
    losses = times["model"] / times["all"]
    return {
        "problems_tuned": len(rows),
        "measured": measured,
        "measured_share": measured["model"] / measured["all"],
        "tuning_seconds": {way: round(seconds, 1) for way, seconds in taken.items()},
        "loss": mean_slowdown(losses.tolist()),
        "loss_max": float(losses.max()),
        "speedup_all": mean_slowdown((times["default"] / times["all"]).tolist()),
        "speedup_model": mean_slowdown((times["default"] / times["model"]).tolist()),
        "unsure": sum("unsure" in c.reason for c in found["model"].values()),
    }


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table(title="tuning: everything measured, or what the model picks")
    for name in ("", "all", "model"):
        table.add_column(name, justify="right")
    table.add_row("measured", *(str(result["measured"][w]) for w in ("all", "model")))
    table.add_row("seconds", *(f"{result['tuning_seconds'][w]}" for w in ("all", "model")))
    table.add_row(
        "speedup over default", *(f"{result[f'speedup_{w}']:.3f}" for w in ("all", "model"))
    )
    table.add_row("loss (worst)", "", f"{result['loss']:.3f} ({result['loss_max']:.3f})")
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--only", default="", help="a regular expression of problems' names")
    parser.add_argument("--width", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
