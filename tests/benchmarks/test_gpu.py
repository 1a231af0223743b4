"""The GPU benchmark checks every entry without a GPU, and times nothing on one that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes for Linux alone")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_entry_is_right_at_tiny_sizes() -> None:
    ran = run("--dry-run")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in (
        "decode_attention",
        "prefill_attention",
        "gemv int8",
        "gathered_mlp",
        "lora shards",
    ):
        assert name in ran.stdout


def test_wrong_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_case import Case, WrongNumbers, check

    from rewriter.cost.cost import Cost

    right = torch.randn(4, 4)
    case = Case("k", "4x4", torch.float32, lambda: right, lambda: right, Cost())
    assert check(case) == {"ours": 0.0}
    case.peers["wrong"] = lambda: right + 0.01
    with pytest.raises(WrongNumbers, match="k 4x4, wrong"):
        check(case)
    case.peers["wrong"] = lambda: right * torch.nan
    with pytest.raises(WrongNumbers):
        check(case)
    case.peers["wrong"] = lambda: right[:2]
    with pytest.raises(WrongNumbers, match=r"\(2, 4\)"):
        check(case)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed() -> None:
    ran = run("--only", "merge_lse")
    assert ran.returncode == 1
    assert "no CUDA device" in ran.stdout
