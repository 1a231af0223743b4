"""What the speed benchmarks share: samples, the machine they ran on, and where results go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from rewriter import processor

__all__ = ["Samples", "machine", "read_bandwidth", "save_result", "timed"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Samples:
    """Wall times of one candidate, in milliseconds."""

    name: str
    ms: list[float] = field(default_factory=list)

    @property
    def p50(self) -> float:
        """The median."""
        return statistics.median(self.ms)

    @property
    def least(self) -> float:
        """The quickest: what the machine can do when nothing else runs."""
        return min(self.ms)

    def percentile(self, percent: int) -> float:
        """The sample that `percent` of all are not above."""
        ordered = sorted(self.ms)
        return ordered[round(percent / 100 * (len(ordered) - 1))]

    def as_dict(self) -> dict[str, float]:
        """p10, p50, p90, min in milliseconds, and how many."""
        quantiles = {f"p{p}_ms": self.percentile(p) for p in (10, 50, 90)}
        return {**quantiles, "min_ms": self.least, "samples": len(self.ms)}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its wall milliseconds."""
    start = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - start) * 1e3


def machine(threads: int) -> dict[str, Any]:
    """Device, versions, commit, date, and how busy the machine was when the run began."""
    return {
        "device": processor.name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def read_bandwidth(mebibytes: int = 512, repeats: int = 5) -> float:
    """Most bytes a second that summing fp32 numbers reads here, with the threads set."""
    numbers = torch.ones(mebibytes * 2**18)
    quickest = min(timed(numbers.sum)[1] for _ in range(repeats))
    return numbers.nbytes / quickest * 1e3


def save_result(name: str, result: dict[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _commit() -> str:
    """The short hash of the checkout, with + when it was edited since; "" outside of git."""
    git = ("git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*")
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip()
