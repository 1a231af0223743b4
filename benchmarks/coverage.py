"""Which models go through: capture, raising, derived decoding, equal numbers.

    python benchmarks/coverage.py                    # decoder families, sdpa and eager
    python benchmarks/coverage.py --encoders         # encoder and vision models
    python benchmarks/coverage.py --family llama,gpt2 --json coverage.json

Every model is a Hugging Face (or timm) architecture with a tiny random configuration; nothing is
downloaded. The exit code is 1 when the bars are not met or any number is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from encoders import ENCODERS
from families import DECODERS
from measure import MAX_ERROR, Row, measure_encoder, measure_family
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import machine

DECODER_BAR = 46
ENCODER_BAR = 12
SPELLINGS = ("sdpa", "eager")
Task = tuple[Callable[[Any, str], Row], Any, str]


def main() -> int:
    """Run, print the table and the totals. Returns the exit code."""
    arguments = _arguments()
    names = [name for name in arguments.family.split(",") if name]
    rows = _run(arguments.encoders, names, arguments.workers)
    console = Console(stderr=arguments.json == "-", width=arguments.width)
    console.print(_table(rows, arguments.encoders))
    _print_problems(console, rows)
    met, totals = (_encoder_totals if arguments.encoders else _decoder_totals)(rows, bool(names))
    console.print(totals)
    if arguments.json:
        _write_json(arguments.json, rows, totals)
    return 0 if met else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", default="", help="only these, separated by commas")
    parser.add_argument("--encoders", action="store_true", help="encoder and vision models instead")
    parser.add_argument("--json", default="", help="also write the rows to this file; - = stdout")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--width", type=int, default=None, help="columns of the table")
    return parser.parse_args()


def _run(encoders: bool, names: Sequence[str], workers: int) -> list[Row]:
    """All rows, in the zoo's order; every worker is a fresh process with one thread."""
    tasks = list(_encoder_tasks(names) if encoders else _decoder_tasks(names))
    if not tasks:
        sys.exit(f"no model of the zoo is called {', '.join(names)}")
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=24) as pool:
        measured = pool.imap(_measured, tasks)
        rows = list(track(measured, total=len(tasks), console=Console(stderr=True)))
        pool.close()
        pool.join()
    return rows


def _measured(task: Task) -> Row:
    measure, model, spelling = task
    return measure(model, spelling)


def _encoder_tasks(names: Sequence[str]) -> Iterator[Task]:
    for encoder in (e for e in ENCODERS if not names or e.name in names):
        for spelling in encoder.spellings:
            yield measure_encoder, encoder, spelling


def _decoder_tasks(names: Sequence[str]) -> Iterator[Task]:
    for family in (f for f in DECODERS if not names or f.model_type in names):
        for spelling in SPELLINGS:
            yield measure_family, family, spelling


def _table(rows: Sequence[Row], encoders: bool) -> Table:
    columns = ["model", "attention", "raised", "masks", "error"]
    columns += [] if encoders else ["decode", "tokens", "padded"]
    table = Table(*columns, "s", title="Encoders and vision" if encoders else "Decoder families")
    for row in rows:
        cells = [row.family, row.attention or "-", f"{row.raised}/{row.candidates}"]
        cells += [", ".join(row.masks), "-" if row.error is None else f"{row.error:.1e}"]
        if not encoders:
            cells += [_decode_cell(row), _mark(row.tokens), _mark(row.padded)]
        good = row.complete or row.unavailable or (encoders and row.equal and row.all_raised)
        style = "" if good or (row.expected and row.equal) else "red"
        table.add_row(*cells, f"{row.seconds:.0f}", style="dim" if row.unavailable else style)
    return table


def _decode_cell(row: Row) -> str:
    if row.unavailable:
        return "model has no such spelling"
    return "derived" if row.decode == "derived" else row.decode[:60] or row.problem[:60]


def _mark(value: bool | None) -> str:
    return {True: "equal", False: "DIFFER", None: "-"}[value]


def _print_problems(console: Console, rows: Sequence[Row]) -> None:
    """Full reasons, below the table that cuts them."""
    for row in rows:
        reasons = [row.problem, "" if row.decode == "derived" else row.decode]
        reasons += [miss for miss in row.misses if "raise-attention" in miss]
        for reason in filter(None, reasons):
            console.print(f"{row.family} {row.attention}: {reason}", markup=False, highlight=False)


def _decoder_totals(rows: Sequence[Row], partial: bool) -> tuple[bool, str]:
    """Whether the bars are met, and the line that says so."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    both = sum(len(f) == 2 and all(r.complete for r in f) for f in families.values())
    single = sum(
        any(r.complete for r in f) and all(r.complete or r.unavailable for r in f)
        for f in families.values()
    )
    wrong = [f"{r.family} {r.attention}" for r in rows if r.wrong]
    met = not wrong and (both >= DECODER_BAR or (partial and single == len(families)))
    text = (
        f"{len(families)} families: {both} complete in both spellings (bar {DECODER_BAR}), "
        f"{single - both} more in the only spelling they offer; "
        f"wrong numbers: {', '.join(wrong) or 'none'} (error bar {MAX_ERROR:g}, tokens equal)"
    )
    return met, text


def _encoder_totals(rows: Sequence[Row], partial: bool) -> tuple[bool, str]:
    names = list(dict.fromkeys(row.family for row in rows))
    tried = {r.family for r in rows if not r.unavailable}
    failed = {r.family for r in rows if not (r.unavailable or (r.equal and r.all_raised))}
    absent = set(names) - tried
    good, wrong = len(tried - failed), [r.family for r in rows if r.wrong]
    met = not wrong and (good >= ENCODER_BAR or (partial and not failed))
    text = (
        f"{len(names)} models: {good} with equal outputs and every attention raised "
        f"(bar {ENCODER_BAR}); "
        f"skipped: {', '.join(sorted(absent)) or 'none'}; "
        f"wrong numbers: {', '.join(wrong) or 'none'}"
    )
    return met, text


def _write_json(path: str, rows: Sequence[Row], totals: str) -> None:
    listed = [dataclasses.asdict(row) for row in rows]
    text = json.dumps({"machine": machine(1), "totals": totals, "rows": listed}, indent=1)
    if path == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
