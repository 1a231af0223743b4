"""What exporting takes, and how soon what was exported answers.

    python benchmarks/export.py --shape 110m
    python benchmarks/export.py --shape 1b --formats portable.onnx,cpu.onnx,m.pt2

Each export is `rewriter export` in a process of its own: its time, its most memory over the bytes of the
weights, and the size of what it wrote. Then a fresh process loads the artifact and decodes: seconds until
the first token, apart for importing, opening (checks of everything but the hash of the weights), and the
prompt; beside the time of reading the same bytes from the same disk cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peers.llama import SHAPES, write_model
from rich.console import Console
from rich.table import Table
from timing import machine, save_result

FORMATS = {
    "portable.onnx": ("--ep", "portable"),
    "cpu.onnx": ("--ep", "cpu"),
    "m.pt2": (),
    "portable.pt2": ("--portable",),
}
"""File names, which say the format, and the options of each."""

LOAD_ONNX = """
import json, sys, time
start = time.perf_counter()
import numpy as np
from rewriter.deploy import OnnxDecoder
imported = time.perf_counter()
decoder = OnnxDecoder(sys.argv[1], check_data=False)
loaded = time.perf_counter()
decoder.run(np.arange(3, 19)[None])
"""
LOAD_PT2 = """
import json, sys, time
start = time.perf_counter()
import torch
from rewriter.export.pt2_model import load_pt2
imported = time.perf_counter()
model = load_pt2(sys.argv[1], check_weights=False)
loaded = time.perf_counter()
model.session(1).run(torch.arange(3, 19)[None], logits_to_keep=1)
"""
REPORT = """
first = time.perf_counter()
print(json.dumps({"import_s": imported - start, "load_s": loaded - imported, "prompt_s": first - loaded}))
"""


def main() -> None:
    """Export, load, print and store."""
    arguments = _arguments()
    shape = SHAPES[arguments.shape]
    model = write_model(
        arguments.work_dir / f"{arguments.shape}-float32" / "model", shape, torch.float32
    )
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    found = {name: _measured(name, model, weights, arguments) for name in arguments.formats}
    Console(stderr=True).print(_table(arguments.shape, found))
    result = {"machine": machine(arguments.threads), "shape": vars(shape), "weight_bytes": weights}
    print(save_result(f"export-{arguments.shape}", {**result, "formats": found}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="110m")
    parser.add_argument("--formats", type=_formats, default=list(FORMATS), metavar="NAME,...")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "whole-model"
    )
    return parser.parse_args()


def _formats(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in FORMATS]:
        raise argparse.ArgumentTypeError(f"{unknown} not among {list(FORMATS)}")
    return names


def _measured(
    name: str, model: Path, weights: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One export and one start."""
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as directory:
        target = Path(directory) / name
        command = [sys.executable, "-m", "rewriter", "export", str(model), "-o", str(target)]
        start = time.perf_counter()
        done = subprocess.Popen(
            [*command, *FORMATS[name], "--json"], stdout=subprocess.PIPE, env=environment
        )
        assert done.stdout is not None
        text = done.stdout.read()
        _, status, usage = os.wait4(done.pid, 0)
        done.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if done.returncode:
            return {"failed": f"exit code {done.returncode}"}
        written = sum(path.stat().st_size for path in Path(directory).iterdir())
        return {
            "export_s": seconds,
            "stages_s": json.loads(text)["seconds"],
            "peak_bytes": _peak(usage),
            "peak_over_weights": _peak(usage) / weights,
            "written_bytes": written,
            "read_s": _read_s(Path(directory)),
            "start": _start(target, environment),
        }


def _peak(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * 1024


def _read_s(directory: Path) -> float:
    """Reading all files once more, from memory where they fit there."""
    start = time.perf_counter()
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(2**24)
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def _start(artifact: Path, environment: dict[str, str]) -> dict[str, float]:
    """Of a fresh process: the second of two, so that the files are in memory."""
    code = (LOAD_PT2 if artifact.suffix == ".pt2" else LOAD_ONNX) + REPORT
    command = [sys.executable, "-c", code, str(artifact)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, env=environment, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _table(shape: str, found: dict[str, dict[str, Any]]) -> Table:
    columns = ("", "export s", "peak / weights", "written MiB", "import s", "load s", "prompt s")
    table = Table(*columns, title=f"exports of {shape}, float32")
    for name, facts in found.items():
        if "failed" in facts:
            table.add_row(name, facts["failed"])
            continue
        start = facts["start"]
        numbers = (facts["export_s"], facts["peak_over_weights"], facts["written_bytes"] / 2**20)
        seconds = (start["import_s"], start["load_s"], start["prompt_s"])
        table.add_row(name, *(f"{number:.2f}" for number in (*numbers, *seconds)))
    return table


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
