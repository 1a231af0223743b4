"""What `optimize` adds on top of `torch.export`, and how that grows with the layers.

    python benchmarks/overhead.py                    # 12, 24 and 48 layers
    python benchmarks/overhead.py --layers 24 48 --no-verify

The models are narrow Llamas with random weights: all of the time goes into the graph, none into the
arithmetic. `added` is the wall time of `optimize` without its call of `torch.export.export`:
lowering to ATen, raising, derivation, passes and verification. The exit code is 1 when it is more
than the export took, or more than doubles from the second to the last number of layers.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import machine, save_result, timed
from transformers import LlamaConfig, LlamaForCausalLM

from rewriter import optimize

MAX_RATIO = 1.0
"""Most that may be added, in times of the export."""
MAX_GROWTH = 2.0
"""Most that it may grow by when the layers double."""


@dataclass(frozen=True)
class Row:
    """Seconds for one number of layers: the medians over the repeats.

    Attributes:
        export: in `torch.export.export`, inside `optimize`.
        added: everything else that `optimize` does.
        stages: of that, by the report's own clock.
    """

    layers: int
    export: float
    added: float
    stages: dict[str, float]

    @property
    def ratio(self) -> float:
        """How much is added to a second of export."""
        return self.added / self.export


def main() -> int:
    """Run, print and store. Returns the exit code."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    console = Console(stderr=arguments.json == "-")
    where = machine(arguments.threads)
    _measure(2, arguments)  # imports and first-time work of torch are nobody's
    turns = [layers for _ in range(arguments.repeats) for layers in arguments.layers]
    measured = [_measure(n, arguments) for n in track(turns, console=Console(stderr=True))]
    rows = [_median([r for r in measured if r.layers == layers]) for layers in arguments.layers]
    growth = _growth(measured, arguments.layers)
    console.print(_table(rows))
    met = all(row.ratio <= MAX_RATIO for row in rows) and (growth or 0.0) <= MAX_GROWTH
    console.print(_verdict(rows, growth))
    listed = [asdict(row) | {"ratio": round(row.ratio, 3)} for row in rows]
    result = {"machine": where, "rows": listed, "growth": growth, "verify": arguments.verify}
    console.print(f"stored in {save_result('overhead', result)}", highlight=False)
    if arguments.json == "-":
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0 if met else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--repeats", type=int, default=3, help="turns of every number of layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", default="", help="- prints the result as JSON, too")
    return parser.parse_args()


def _measure(layers: int, arguments: argparse.Namespace) -> Row:
    model = _model(layers)
    gc.collect()  # what earlier turns left behind
    optimized, milliseconds = timed(lambda: optimize(model, verify=arguments.verify))
    stages = dict(optimized.report.seconds)
    export = stages.pop("export")
    stages["capture"] -= export
    return Row(layers, export, milliseconds / 1e3 - export, stages)


def _model(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _median(rows: list[Row]) -> Row:
    stages = {
        name: round(statistics.median(row.stages[name] for row in rows), 3)
        for name in rows[0].stages
    }
    export, added = (
        round(statistics.median(values), 3)
        for values in ([row.export for row in rows], [row.added for row in rows])
    )
    return Row(rows[0].layers, export, added, stages)


def _growth(measured: list[Row], layers: list[int]) -> float | None:
    """From the last but one number of layers to the last, where that is a doubling.

    The median over the turns: what slows a shared machine down slows both runs of a turn.
    """
    if len(layers) < 2 or layers[-1] != 2 * layers[-2]:
        return None
    small, large = ([r.added for r in measured if r.layers == n] for n in layers[-2:])
    return round(statistics.median(b / a for a, b in zip(small, large, strict=True)), 3)


def _table(rows: list[Row]) -> Table:
    stages = [name for name in rows[0].stages if rows[-1].stages[name] >= 0.005]
    table = Table(title="seconds", caption="capture: what remains of it without the export")
    table.add_column("layers", justify="right")
    for header in ("export", "added", "added / export", *stages):
        table.add_column(header, justify="right")
    for row in rows:
        numbers: list[Any] = [row.export, row.added, row.ratio, *(row.stages[s] for s in stages)]
        table.add_row(str(row.layers), *(f"{value:.2f}" for value in numbers))
    return table


def _verdict(rows: list[Row], growth: float | None) -> str:
    worst = max(row.ratio for row in rows)
    text = f"added / export: at most {worst:.2f} (bar {MAX_RATIO:g})"
    if growth is not None:
        step = f"{rows[-2].layers} → {rows[-1].layers} layers"
        text += f"; {step}: {growth:.2f}x (bar {MAX_GROWTH:g})"
    return text


if __name__ == "__main__":
    sys.exit(main())
