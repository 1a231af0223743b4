"""Run times of the Triton kernels' configurations on a GPU: each is checked first, then timed in turns.

Passes go through all configurations of a shape in another order each. A time is between two events of the
device, behind a write to more than its second cache holds: caches are cold, and the launch is queued while
that write runs. What was measured is kept line by line, so that a run goes on where it was stopped.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ir_dataset.cost_models.triton_driver import CudaError, Driver
from ir_dataset.cost_models.triton_families import Family, Shape, recorded
from ir_dataset.cost_models.triton_pack import Pack
from rewriter.errors import InputError, RewriterError

__all__ = [
    "LINES",
    "MAX_ERROR",
    "clocks",
    "device_target",
    "dry_run",
    "measure",
    "measured_lines",
]

LINES = "measured.jsonl"
MAX_ERROR = 2e-2
"""Largest |result - reference| over the largest |reference|, in bf16."""
_FLUSH_BYTES = 256 * 2**20
_QUERY = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def error_of(result: torch.Tensor, wanted: torch.Tensor) -> float:
    """See `MAX_ERROR`; NaN where anything is not a number."""
    if result.shape != wanted.shape:
        return float("nan")
    scale = wanted.float().abs().max().clamp_min(1e-12)
    return float((result.float() - wanted.float()).abs().max() / scale)


def dry_run(families: Sequence[Family], each: int = 3) -> Iterator[tuple[str, Any, float]]:
    """Family, configuration and error of a few configurations at tiny shapes, on the CPU.

    Needs TRITON_INTERPRET=1 before Triton is imported.
    """
    for family in families:
        case = family.make(family.tiny, torch.device("cpu"))
        wanted = case.reference()
        every = family.configurations(family.tiny)
        for config in every[:: max(1, -(-len(every) // each))]:
            yield family.name, config, error_of(case.run(config), wanted)


def clocks() -> dict[str, str] | None:
    """The GPU's clocks, temperature and power now, as its tool tells them; None without the tool."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    cells = ran.stdout.splitlines()[torch.cuda.current_device()].split(",")
    return dict(zip(_QUERY, map(str.strip, cells), strict=True))


def measured_lines(root: Path) -> list[dict[str, Any]]:
    """What was measured into a pack's directory so far: one entry for each family and shape."""
    path = root / LINES
    if not path.is_file():
        return []
    whole = (line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
    return [json.loads(line) for line in whole]


def measure(
    pack: Pack,
    families: Sequence[Family],
    *,
    passes: int = 4,
    runs: int = 5,
    seconds: float = float("inf"),
    told: Callable[[str], None] = lambda _: None,
) -> bool:
    """Measure into the pack's directory what is not there yet.

    Args:
        runs: in each pass, behind one that is not timed.
        seconds: after which no other shape begins.
        told: takes one line for each shape.

    Returns:
        whether everything has been measured.

    Raises:
        ConfigError: there is no GPU.
    """
    begun, driver = time.monotonic(), Driver(pack)
    known = {(one["family"], json.dumps(one["shape"])) for one in measured_lines(pack.store.root)}
    with (pack.store.root / LINES).open("a") as stream:
        for family in families:
            for shape in family.shapes:
                if (family.name, json.dumps(dict(shape))) in known:
                    continue
                if time.monotonic() - begun > seconds:
                    return False
                found = _shape(driver, family, shape, passes, runs)
                stream.write(json.dumps(found) + "\n")
                stream.flush()
                wrong = sum(bool(one["reason"]) for one in found["configs"])
                right = len(found["configs"]) - wrong
                told(f"{family.name} {dict(shape)}: {right} measured, {wrong} not")
    return True


def _shape(driver: Driver, family: Family, shape: Shape, passes: int, runs: int) -> dict[str, Any]:
    """All configurations of one shape: errors, and of each pass the least and the median seconds."""
    torch.manual_seed(0)
    case = family.make(shape, torch.device("cuda"))
    wanted = case.reference()
    ready: dict[int, Callable[[], None]] = {}
    configs = []
    for at, config in enumerate(family.configurations(shape)):
        row: dict[str, Any] = {"config": asdict(config), "reason": "", "min": [], "median": []}
        configs.append(row)
        try:
            launches, result = recorded(case, config)
            call = driver.prepared(launches)
            result.fill_(torch.nan)
            call()
            torch.cuda.synchronize()
            row["error"] = error_of(result, wanted)
        except (CudaError, InputError) as error:
            row["reason"] = str(error)
            continue
        if row["error"] <= MAX_ERROR:
            ready[at] = call
        else:
            row["reason"] = f"error {row['error']:.1e}, allowed {MAX_ERROR:.0e}"
            row["error"] = None
    del wanted
    told = [clocks()]
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    order = random.Random(0)
    for _ in range(passes):
        for at in order.sample(sorted(ready), len(ready)):
            found = _seconds(ready[at], flush, runs)
            configs[at]["min"].append(min(found))
            configs[at]["median"].append(statistics.median(found))
        told.append(clocks())
    used = dict(driver.used)
    return {"family": family.name, "shape": dict(shape), "configs": configs, "clocks": told} | {
        "texts": used
    }


def _seconds(call: Callable[[], None], flush: torch.Tensor, runs: int) -> list[float]:
    """Of each run; the first is not counted."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs + 1)]
    for start, stop in events:
        flush.zero_()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e-3 for start, stop in events[1:]]


def device_target() -> str:
    """What this machine's GPU runs, by the names of targets. Raises RewriterError where there is none."""
    if not torch.cuda.is_available():
        raise RewriterError("no CUDA device; --dry-run checks some configurations without one")
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:sm_{major}{minor}"
