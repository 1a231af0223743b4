"""How good the cost models are, beside what they have to beat, over five seeds.

    python benchmarks/cost_model.py                            # CPU configurations, from the package's data
    python benchmarks/cost_model.py --only second-machine      # what they tell about another processor
    python benchmarks/cost_model.py --only size level2 --dataset DIR   # code size, over a packed dataset
    python benchmarks/cost_model.py --only transfer --dataset DIR      # does the corpus help run times?

Nothing is timed here: configurations are judged by the half of the measured passes that nothing was
chosen by. Results go to benchmarks/results/cost-model-<section>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ir_dataset.cost_models import cpu_data, cpu_ir, size, size_data
from ir_dataset.cost_models.cpu_data import CpuData
from ir_dataset.cost_models.cpu_features import CODE, PER_ELEMENT
from ir_dataset.cost_models.cpu_loops import Configuration, body_name
from ir_dataset.cost_models.evaluate import (
    Judged,
    folds,
    interval,
    judge_model,
    judge_scores,
    noise_floor,
    summary,
)
from ir_dataset.cost_models.level2 import Network
from ir_dataset.cost_models.ranking import Groups
from ir_dataset.cost_models.settings import CPU

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("cpu", "second-machine", "size", "level2", "transfer")
SHOWN = ("top1", "top1_max", "top3", "top5", "tau", "unsure_share", "top1_or_default")


def main() -> int:
    """Run, print and store."""
    arguments = _arguments()
    sections: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "cpu": _cpu,
        "second-machine": _second_machine,
        "size": _size,
        "level2": _level2,
        "transfer": _transfer,
    }
    console = Console(width=arguments.width)
    for name in arguments.only or ["cpu"]:
        rows = sections[name](arguments)
        told = {
            "machine": {"cores": os.cpu_count()},
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "seeds": arguments.seeds,
            "rows": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"cost-model-{name}.json"
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        console.print(_table(name, rows))
    return 0


# --- configurations of CPU kernels ---------------------------------------------------------------


def _cpu(arguments: argparse.Namespace) -> dict[str, Any]:
    data = cpu_data.load()
    rows: dict[str, Any] = {"noise floor": _one(noise_floor(data.groups, data.last, data.default))}
    for name, scores in _fixed(data).items():
        rows[name] = _one(list(_judged(data, scores)))
    random = [
        summary(list(_judged(data, np.random.default_rng(seed).random(len(data.last)))))
        for seed in range(arguments.seeds)
    ]
    rows["random"] = _over_seeds(random)
    code = {*CODE, *PER_ELEMENT}
    models = {"level 1": data.groups, "level 1 without code": _without(data.groups, code)}
    for kind, count in (("shape", 5), ("family", 7), ("random", 5)):
        for name, groups in models.items():
            if kind == "random" and name != "level 1":
                continue
            found = [_held_out(data, groups, kind, count, seed) for seed in range(arguments.seeds)]
            rows[f"{name}, held-out {kind}"] = _over_seeds(found)
    return rows


def _second_machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is known there from measurements there, and from those of the first machine."""
    seeds = arguments.seeds
    first, second = cpu_data.load(), cpu_data.load(cpu_data.SECOND_MACHINE)
    rows: dict[str, Any] = {
        "noise floor": _one(noise_floor(second.groups, second.last, second.default)),
        "default": _one(list(_judged(second, np.where(second.default, 0.0, 1.0)))),
        "level 1, held-out shape": _over_seeds(
            [_held_out(second, second.groups, "shape", 5, seed) for seed in range(seeds)]
        ),
    }
    across = [_across(first, second, seed) for seed in range(seeds)]
    for name in across[0]:
        rows[f"level 1 of the first machine, {name}"] = _over_seeds([a[name] for a in across])
    return rows


def _across(known: CpuData, asked: CpuData, seed: int) -> dict[str, dict[str, float]]:
    """Learn from one machine alone and judge by another, on shapes that the first measured or not."""
    shift = int(asked.groups.groups.max()) + 1
    pairs = [(asked.groups, 0), (known.groups, shift)]
    groups = Groups(
        np.vstack([part.features for part, _ in pairs]),
        asked.groups.names,
        np.concatenate([part.groups + added for part, added in pairs]),
        np.concatenate([part.seconds for part, _ in pairs]),
    )
    last, default = (
        np.concatenate([getattr(asked, name), getattr(known, name)]) for name in ("last", "default")
    )
    held, measured = groups.groups < shift, set(known.shapes.values())
    parts: dict[str, list[Judged]] = {"measured shape": [], "new shape": []}
    prepare = cpu_data.with_priors
    for one, _ in judge_model(groups, last, held, default, CPU, seed, prepare=prepare):
        old = asked.shapes[one.group] in measured
        parts["measured shape" if old else "new shape"].append(one)
    return {name: summary(part) for name, part in parts.items()}


def _held_out(data: CpuData, groups: Groups, kind: str, count: int, seed: int) -> dict[str, float]:
    judged: list[Judged] = []
    for held in folds(kind, groups.groups, data.families, count, seed):
        prepare = cpu_data.with_priors if kind == "shape" else None
        found = judge_model(groups, data.last, held, data.default, CPU, seed, prepare=prepare)
        judged += [j for j, _ in found]
    return summary(judged)


def _transfer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Level 1 alone, with the IR's own features, and with a network's embedding of it from a corpus."""
    data, bodies = cpu_data.load(), cpu_ir.load()
    knobs = data.groups.features[:, [data.groups.names.index(k) for k in cpu_data.KNOBS]]
    keys = [
        (data.family_names[family], body_name(Configuration(*map(int, row))))
        for family, row in zip(data.families, knobs, strict=True)
    ]
    ir = np.stack([bodies[key] for key in keys])
    corpus = size_data.read(arguments.dataset)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        learned = Network.fit(corpus.features, list(corpus.sizes.values()), seed=seed).embed(ir)
        variants = {
            "level 1": data.groups,
            "level 1 and IR features": _with(data.groups, ir, "ir"),
            "level 1 and the corpus's embedding": _with(data.groups, learned, "level2"),
        }
        for name, groups in variants.items():
            told = _held_out(data, groups, "family", 7, seed)
            found.setdefault(f"{name}, held-out family", []).append(told)
    return {name: _over_seeds(each) for name, each in found.items()}


def _with(groups: Groups, values: np.ndarray, prefix: str) -> Groups:
    kept = np.flatnonzero(values.std(0) > 0)
    names = (*groups.names, *(f"{prefix}_{at}" for at in kept))
    return replace(groups, features=np.hstack([groups.features, values[:, kept]]), names=names)


def _fixed(data: CpuData) -> dict[str, np.ndarray]:
    """Selectors that learn nothing, or one configuration for everything; by their scores."""
    names = data.groups.names
    column = {name: data.groups.features[:, at] for at, name in enumerate(names)}
    knobs = data.groups.features[:, [names.index(k) for k in cpu_data.KNOBS]]
    _, number = np.unique(knobs, axis=0, return_inverse=True)
    number = number.ravel()
    static = np.bincount(number, data.groups.centred()) / np.bincount(number)
    return {
        "default": np.where(data.default, 0.0, 1.0),
        "best static (in sample)": static[number],
        "level 0": column["log_seconds"],
        "llvm-mca": column["log_mca_seconds"],
    }


def _judged(data: CpuData, scores: np.ndarray) -> Iterator[Judged]:
    for group in np.unique(data.groups.groups):
        at = np.flatnonzero(data.groups.groups == group)
        default = int(np.flatnonzero(data.default[at])[0])
        yield judge_scores(int(group), scores[at], data.last[at], default)


def _without(groups: Groups, names: set[str]) -> Groups:
    kept = [at for at, name in enumerate(groups.names) if name not in names]
    chosen = tuple(groups.names[at] for at in kept)
    return replace(groups, features=groups.features[:, kept], names=chosen)


# --- code size -----------------------------------------------------------------------------------


def _size(arguments: argparse.Namespace) -> dict[str, Any]:
    data = size_data.read(arguments.dataset)
    rows: dict[str, Any] = {}
    for kind in size.KINDS:
        settings = size.SizeSettings(kind=kind)
        known = data.rows(kind)
        for name, by_project in (("held-out project", True), ("random split", False)):
            found = [
                size.evaluate(
                    known, settings, folds=arguments.folds, seed=seed, by_project=by_project
                )
                for seed in range(arguments.seeds if by_project else 1)
            ]
            rows[f"{kind}, {name}"] = _over_seeds(found)
    return rows


def _level2(arguments: argparse.Namespace) -> dict[str, Any]:
    data = size_data.read(arguments.dataset)
    known = data.rows("Oz")
    second = data.sizes["O2"][data.known("Oz")]
    rows: dict[str, Any] = {}
    for name, tasks in (("network, Oz and O2", 2), ("network, Oz alone", 1)):

        def fit(train: size.SizeRows, seed: int, tasks: int = tasks) -> Any:
            other = second[_positions(known, train)]
            return _SizeNetwork(train, other if tasks == 2 else None, seed)

        found = [
            size.evaluate(known, size.SizeSettings(), folds=arguments.folds, seed=seed, fit=fit)
            for seed in range(arguments.seeds)
        ]
        rows[name] = _over_seeds(found)
    return rows


def _positions(whole: size.SizeRows, part: size.SizeRows) -> np.ndarray:
    """Rows of `whole` that `part` has: all of its projects, in the same order."""
    return np.flatnonzero(np.isin(whole.projects, np.unique(part.projects)))


class _SizeNetwork:
    def __init__(self, rows: size.SizeRows, other: np.ndarray | None, seed: int) -> None:
        labels = [rows.sizes] if other is None else [rows.sizes, other]
        self.network = Network.fit(rows.features, labels, seed=seed)

    def predict(self, features: np.ndarray) -> size.SizeAnswer:
        told = self.network.predict(features)[:, 0]
        return size.SizeAnswer(told, told, told, np.zeros(len(told), bool))


# --- tables --------------------------------------------------------------------------------------


def _one(judged: list[Judged]) -> dict[str, Any]:
    return {name: [value, 0.0] for name, value in summary(judged).items()}


def _over_seeds(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    names = [name for name in found[0] if all(name in one for one in found)]
    return {name: list(interval([one[name] for one in found])) for name in names}


def _table(name: str, rows: dict[str, Any]) -> Table:
    shown = (
        SHOWN
        if name in ("cpu", "second-machine", "transfer")
        else ("mape", "median_ape", "tau", "r2_log", "inside_interval")
    )
    table = Table(title=f"cost models: {name}; ± is 95 % over the seeds")
    table.add_column("selector" if shown is SHOWN else "model")
    for column in shown:
        table.add_column(column, justify="right")
    for row, values in rows.items():
        cells = []
        for column in shown:
            mean, half = values.get(column, (float("nan"), 0.0))
            cells.append(f"{mean:.3f}" + (f" ± {half:.3f}" if half else ""))
        table.add_row(row, *cells)
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SECTIONS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5, help="of projects, for code size")
    parser.add_argument("--dataset", type=Path, default=Path("ir-dataset"))
    parser.add_argument("--width", type=int, default=150)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
