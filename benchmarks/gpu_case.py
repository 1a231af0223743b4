"""One kernel on one shape: ours, its reference, the peers, and what has to be moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewriter.cost.cost import Cost

__all__ = ["Call", "Case", "Size", "WrongNumbers", "check", "compiled", "timed"]

Call = Callable[[], Tensor]

MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest |result - reference| over the largest |reference|; TF32 stays off."""


class WrongNumbers(Exception):
    """A candidate's result is not the reference's."""


@dataclass(frozen=True)
class Size:
    """Where a case runs: full on a GPU, or tiny on the CPU, where kernels are interpreted."""

    device: str
    tiny: bool

    def of(self, full: int, tiny: int) -> int:
        """One number of a shape."""
        return tiny if self.tiny else full

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random numbers there."""
        return torch.randn(*shape, device=self.device).to(dtype)


@dataclass
class Case:
    """What runs against what.

    Attributes:
        name, shape: of the kernel; what it ran on, as text.
        ours, reference: the kernel; its meaning in plain PyTorch, checked and not timed.
        peers: other ways to the same result, timed; those that need a GPU are made only there.
        cost: what one call has to move and compute.
    """

    name: str
    shape: str
    dtype: torch.dtype
    ours: Call
    reference: Call
    cost: Cost
    peers: dict[str, Call] = field(default_factory=dict)


def compiled(size: Size, function: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """`torch.compile` of a function; None where nothing is timed."""
    return None if size.tiny else torch.compile(function, dynamic=False)


def check(case: Case) -> dict[str, float]:
    """The error of every candidate. Raises WrongNumbers."""
    wanted = case.reference().float()
    scale = wanted.abs().max().clamp_min(1e-12)
    errors = {}
    for name, call in {"ours": case.ours, **case.peers}.items():
        result = call().float()
        if result.shape != wanted.shape:
            raise WrongNumbers(f"{case.name}, {name}: {tuple(result.shape)}")
        errors[name] = float((result - wanted).abs().max() / scale)
        if not errors[name] <= MAX_ERROR[case.dtype]:
            raise WrongNumbers(f"{case.name} {case.shape}, {name}: error {errors[name]:.2e}")
    return errors


def timed(case: Case, ceiling: float) -> dict[str, Any]:
    """Microseconds of every candidate, and ours as a share of the copy bandwidth.

    Args:
        ceiling: bytes a second that copying moves here.
    """
    from triton.testing import do_bench

    found: dict[str, Any] = {}
    for name, call in {"ours": case.ours, **case.peers}.items():
        p10, p50, p90 = (t * 1e3 for t in do_bench(call, quantiles=[0.1, 0.5, 0.9]))
        found[name] = {"p10_us": p10, "p50_us": p50, "p90_us": p90}
    seconds = found["ours"]["p50_us"] * 1e-6
    best = min((n for n in found if n != "ours"), key=lambda n: found[n]["p50_us"], default=None)
    rate = case.cost.bytes_moved / seconds
    return {
        "candidates": found,
        "gb_per_s": rate / 1e9,
        "percent_of_copy": 100 * rate / ceiling,
        "tflops": case.cost.flops / seconds / 1e12,
        "best_peer": best,
        "speedup_over_best_peer": found[best]["p50_us"] / found["ours"]["p50_us"] if best else None,
    }
