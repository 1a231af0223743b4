"""`rms_norm` of a program and what follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from codegen.triton_kernels.rms_norm import rms_norm
from codegen.triton_program.ledger import Site
from codegen.triton_program.tail import Tail

__all__ = ["rms_norm_site"]


def rms_norm_site(site: Site, arguments: dict[str, Any], tail: Tail) -> Callable[..., Tensor]:
    """`rms_norm(x, weight)` of x [..., width]."""
    settings = {name: arguments[name] for name in ("eps", "weight_offset", "wide_weight")}

    def run(x: Tensor, weight: Tensor, *operands: Tensor) -> Tensor:
        site.ran("rms_norm")
        flat = x.reshape(-1, x.shape[-1])
        epilogue = tail.epilogue or None
        weight = weight.contiguous()
        out, _ = rms_norm(flat, weight, **settings, epilogue=epilogue, operands=operands)
        return out.view(x.shape)

    return run
