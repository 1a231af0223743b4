"""The whole-model benchmark at a tiny shape, without other runtimes: checked, timed, profiled, told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codegen.cpp_kernels import compiler

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "whole_model.py"
ARGUMENTS = (
    "--shape",
    "tiny",
    "--contexts",
    "32",
    "--rounds",
    "2",
    "--steps",
    "2",
    "--threads",
    "1",
)


def run(work_dir: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), *ARGUMENTS, "--work-dir", str(work_dir), "--json", "-"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")
def test_candidates_are_checked_timed_and_profiled(tmp_path: Path) -> None:
    result = run(tmp_path, "--dtype", "int8", "--only", "rewriter cpu", "--profile")
    facts = result["candidates"]
    assert facts["rewriter cpu"]["status"] == "timed"
    (context,) = result["contexts"]
    times = context["candidates"]["rewriter cpu"]
    assert times["samples"] == 4 and 0 < times["min_ms"] <= times["p50_ms"]
    assert 0 < times["agreement"]["divergence"] < 1e-2
    phases = {phase["phase"]: phase for phase in times["phases"]}
    assert phases["gate_up 128 × 64"]["calls"] == 2
    assert phases["gate_up 128 × 64"]["bytes"] == 2 * 2 * (128 * 64 + 4 * 128)
    assert {"attention", "outside", "linear 512 × 64"} <= set(phases)
    read = sum(phase["bytes"] for phase in times["phases"])
    assert read == pytest.approx(times["bytes_per_token"], rel=0.1)
