"""How far two computations of the same function may differ, by dtype. One table, with reasons."""

from __future__ import annotations

import torch

from rewriter.engine.rewrite_pass import Fidelity

__all__ = ["END_TO_END", "IMPLEMENTATION", "end_to_end_tolerance", "tolerance"]

IMPLEMENTATION: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}
"""Largest |difference| over the largest |reference| at one site.

An operator of width up to 10⁴ summed in another order differs by about sqrt(10⁴) roundings of half an
ulp: 6e-6 in fp32; bf16 keeps 8 bits, one rounding of an intermediate is 4e-3. Wrong scales, masks or
positions show at 1e-2 and above in fp32.
"""

END_TO_END: dict[torch.dtype, float] = {
    torch.float64: 1e-8,
    torch.float32: 2e-4,
    torch.bfloat16: 8e-2,
    torch.float16: 2e-2,
}
"""The same for logits: an order of magnitude more, for rounding that passes through every layer."""


def tolerance(fidelity: Fidelity, dtype: torch.dtype) -> float:
    """What a site's relative error has to stay below; 0 demands bitwise equality."""
    if fidelity is Fidelity.EXACT or not dtype.is_floating_point:
        return 0.0
    return IMPLEMENTATION.get(dtype, IMPLEMENTATION[torch.float16])


def end_to_end_tolerance(dtype: torch.dtype) -> float:
    """What the relative error of an output has to stay below; numbers that are not real are exact."""
    if not dtype.is_floating_point:
        return 0.0
    return END_TO_END.get(dtype, END_TO_END[torch.float16])
