"""What runs where kernels were placed, and where they can run at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from codegen.triton_kernels.product import INTERPRETED
from codegen.triton_program.ledger import Ledger
from rewriter.engine.miss import Miss
from rewriter.program import Program

__all__ = ["TritonProgram", "why_not_triton"]


class TritonProgram:
    """A program's `run` with its ledger; kernels are launched on the device of its weights."""

    def __init__(self, run: Callable[..., Any], ledger: Ledger, device: torch.device) -> None:
        self.run, self.ledger, self.device = run, ledger, device

    def __call__(self, *args: Any) -> Any:
        """As the program's graph."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else None
        with on_device or contextlib.nullcontext():
            return self.run(*args)

    def summary(self) -> str:
        """Which kernels ran, and what did not and why."""
        return self.ledger.summary()

    def misses(self) -> list[Miss]:
        """Sites without a kernel, each with its reason."""
        return self.ledger.left


def why_not_triton(program: Program | None) -> str | None:
    """What stands against Triton kernels here, as the allowed value; None where nothing does."""
    if INTERPRETED.value:
        return None
    if not torch.cuda.is_available():
        return "a GPU, or TRITON_INTERPRET=1 before Python starts, which runs kernels on the CPU"
    parameters = () if program is None else program.module.parameters()
    devices = {str(p.device) for p in parameters}
    if len(devices) > 1 or any(not device.startswith("cuda") for device in devices):
        return (
            f"weights on one GPU, not on {', '.join(sorted(devices))}; move the model there first"
        )
    return None
