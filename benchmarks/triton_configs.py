"""Configurations of the project's own Triton kernels: compiled anywhere, measured on a GPU, learned from.

python benchmarks/triton_configs.py compile -o DIR --target cuda:sm_90   # no GPU needed; goes on where it was
python benchmarks/triton_configs.py measure DIR                          # on a GPU
python benchmarks/triton_configs.py measure DIR --dry-run                # checks in the interpreter, no GPU
python benchmarks/triton_configs.py evaluate FILE                        # what models make of it
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

DRY = "--dry-run" in sys.argv
os.environ["TRITON_INTERPRET"] = "1" if DRY else "0"  # decided when Triton is imported

from rich.console import Console  # noqa: E402

from codegen.compile import TARGETS  # noqa: E402
from ir_dataset.cost_models import triton_points  # noqa: E402
from ir_dataset.cost_models.triton_families import FAMILIES  # noqa: E402
from ir_dataset.cost_models.triton_pack import Pack, compile_pack, planned  # noqa: E402
from ir_dataset.progress import shown  # noqa: E402


def main() -> int:
    """Run one of the commands. Returns the exit code."""
    arguments = _arguments()
    return arguments.run(arguments, Console(width=arguments.width))


def _compile(arguments: argparse.Namespace, console: Console) -> int:
    families = [FAMILIES[name] for name in arguments.only or FAMILIES]
    pack = Pack(arguments.out, arguments.target)
    points, texts = [], {}
    for point, told in planned(arguments.target, families, arguments.limit):
        points.append(point)
        texts |= {key: (point.name, text) for key, text in told.items() if key not in texts}
    with shown(console) as progress:
        compile_pack(pack, texts, arguments.jobs, progress)
    table = triton_points.table(pack, points)
    triton_points.write(table, pack)
    console.print(triton_points.told(table), markup=False)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=140, help="columns of tables")
    commands = parser.add_subparsers(required=True)
    part = commands.add_parser("compile", help="ahead of time, without a GPU")
    part.add_argument("-o", "--out", type=Path, required=True, help="directory of the pack")
    cuda = sorted(name for name in TARGETS if name.startswith("cuda"))
    part.add_argument("--target", choices=cuda, default="cuda:sm_90")
    part.add_argument("--limit", type=int, help="points in all, evenly from every family")
    part.add_argument("--only", nargs="*", choices=sorted(FAMILIES))
    part.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    part.set_defaults(run=_compile)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
