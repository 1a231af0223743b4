"""The benchmark of Triton configurations without a GPU: it checks, and measures nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes for Linux alone")
for needed in ("lightgbm", "pyarrow", "msgspec", "pebble"):
    pytest.importorskip(needed)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "triton_configs.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_families_are_checked_in_the_interpreter() -> None:
    ran = run("measure", "--dry-run", "--only", "gemv_row", "gated_activation")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 wrong; nothing is timed in the interpreter" in ran.stdout
    for name in ("gemv_row", "gated_activation"):
        assert ran.stdout.count(f"{name} ") >= 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    ran = run("measure", str(tmp_path))
    assert ran.returncode == 1 and "no CUDA device" in ran.stdout
    assert not list(tmp_path.iterdir())
