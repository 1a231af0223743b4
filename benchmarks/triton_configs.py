"""Configurations of the project's own Triton kernels: compiled anywhere, measured on a GPU, learned from.

    python benchmarks/triton_configs.py compile -o DIR --target cuda:sm_90   # no GPU needed; resumes
    python benchmarks/triton_configs.py measure DIR                          # on a GPU; resumes
    python benchmarks/triton_configs.py measure --dry-run                    # interpreted, checks alone
    python benchmarks/triton_configs.py evaluate FILE                        # what models make of it

Exit codes of `measure`: 0 when all is measured, 1 without a GPU or where a result is wrong, 3 when
`--seconds` were over before the end. Results go to benchmarks/results/triton-configs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

DRY = "--dry-run" in sys.argv
os.environ["TRITON_INTERPRET"] = "1" if DRY else "0"  # decided when Triton is imported

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from timing import RESULTS, machine  # noqa: E402

from codegen.compile import TARGETS  # noqa: E402
from ir_dataset.cost_models import triton_data, triton_measure, triton_points  # noqa: E402
from ir_dataset.cost_models.evaluate import interval  # noqa: E402
from ir_dataset.cost_models.triton_evaluate import selectors  # noqa: E402
from ir_dataset.cost_models.triton_families import FAMILIES, Family  # noqa: E402
from ir_dataset.cost_models.triton_pack import Pack, compile_pack, planned  # noqa: E402
from ir_dataset.cost_models.triton_ranker import fit  # noqa: E402
from ir_dataset.progress import shown  # noqa: E402
from rewriter.errors import ConfigError, RewriterError  # noqa: E402

RESULT = RESULTS / "triton-configs.json"
UNFINISHED = 3
COLUMNS = ("top1", "top1_max", "top3", "top5", "tau", "unsure_share", "top1_or_default")


def main() -> int:
    """Run one of the commands. Returns the exit code."""
    arguments = _arguments()
    console = Console(width=arguments.width)
    try:
        return arguments.run(arguments, console)
    except RewriterError as error:
        console.print(str(error), style="red", markup=False)
        return 1


def _chosen(arguments: argparse.Namespace) -> list[Family]:
    return [FAMILIES[name] for name in arguments.only or FAMILIES]


def _compile(arguments: argparse.Namespace, console: Console) -> int:
    pack = Pack(arguments.out, arguments.target)
    points, texts = [], {}
    for point, told in planned(arguments.target, _chosen(arguments), arguments.limit):
        points.append(point)
        texts |= {key: (point.name, text) for key, text in told.items() if key not in texts}
    with shown(console) as progress:
        compile_pack(pack, texts, arguments.jobs, progress)
    table = triton_points.table(pack, points)
    triton_points.write(table, pack)
    console.print(triton_points.told(table), markup=False)
    return 0


def _measure(arguments: argparse.Namespace, console: Console) -> int:
    if DRY:
        return _dry(arguments, console)
    if arguments.pack is None:
        console.print("DIR is needed: what `compile` wrote", style="red", markup=False)
        return 2
    device, compiled = triton_measure.device_target(), triton_points.target_of(arguments.pack)
    if device != compiled:
        raise ConfigError("DIR", compiled, f"a pack for {device}, the device that is here")
    pack = Pack(arguments.pack, compiled)
    families = _chosen(arguments)
    done = triton_measure.measure(
        pack,
        families,
        passes=arguments.passes,
        seconds=arguments.seconds,
        told=lambda line: console.print(line, markup=False),
    )
    points = {"hash": triton_points.digest(pack.store.root), "target": pack.target}
    lines = triton_measure.measured_lines(pack.store.root)
    found = triton_data.document(lines, _machine(), points)
    RESULT.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    console.print(f"{RESULT}", markup=False)
    wrong = sum("error" in why for shape in found["shapes"] for why in shape["reasons"].values())
    if wrong:
        console.print(f"{wrong} configurations gave wrong numbers", style="red", markup=False)
        return 1
    return 0 if done else UNFINISHED


def _machine() -> dict[str, Any]:
    import triton

    card = torch.cuda.get_device_properties(0)
    return {
        **machine(torch.get_num_threads()),
        "gpu": card.name,
        "multiprocessors": card.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _dry(arguments: argparse.Namespace, console: Console) -> int:
    torch.manual_seed(0)
    wrong = 0
    for family, config, error in triton_measure.dry_run(_chosen(arguments)):
        right = error <= triton_measure.MAX_ERROR
        wrong += not right
        console.print(f"{family} {config}: error {error:.1e}", markup=False)
    console.print(f"{wrong} wrong; nothing is timed in the interpreter", markup=False)
    return 1 if wrong else 0


def _evaluate(arguments: argparse.Namespace, console: Console) -> int:
    points = arguments.pack / triton_points.FILE if arguments.pack else None
    data = triton_data.load(arguments.file, points)
    table = Table(title="configurations of Triton kernels; ± is 95 % over the seeds")
    for column in ("selector", *COLUMNS):
        table.add_column(column, justify="left" if column == "selector" else "right")
    for name, found in selectors(data, arguments.seeds):
        told = [interval([one[column] for one in found]) for column in COLUMNS]
        table.add_row(
            name, *(f"{m:.3f}" + (f" ± {h:.3f}" if len(found) > 1 else "") for m, h in told)
        )
    console.print(table)
    if arguments.save:
        fit(data).save(arguments.save)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=150, help="columns of tables")
    commands = parser.add_subparsers(required=True)
    part = commands.add_parser("compile", help="ahead of time, without a GPU")
    part.add_argument("-o", "--out", type=Path, required=True, help="directory of the pack")
    cuda = sorted(name for name in TARGETS if name.startswith("cuda"))
    part.add_argument("--target", choices=cuda, default="cuda:sm_90")
    part.add_argument("--limit", type=int, help="points in all, evenly from every family")
    part.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    part.set_defaults(run=_compile)
    other = commands.add_parser("measure", help="on a GPU")
    other.add_argument("pack", type=Path, nargs="?", metavar="DIR")
    other.add_argument("--dry-run", action="store_true", help="a few tiny checks without a GPU")
    other.add_argument("--passes", type=int, default=4)
    other.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    other.set_defaults(run=_measure)
    for each in (part, other):
        each.add_argument("--only", nargs="*", choices=sorted(FAMILIES))
    last = commands.add_parser("evaluate", help="models learned from measurements")
    last.add_argument("file", type=Path)
    last.add_argument("--pack", type=Path, metavar="DIR", help="what was measured, else what ships")
    last.add_argument("--seeds", type=int, default=5)
    last.add_argument("--save", type=Path, help="store the model that learned from everything")
    last.set_defaults(run=_evaluate)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
