"""Activation functions that Triton's language does not have; each takes and gives fp32."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gelu", "gelu_tanh", "silu", "tanh"]


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Through e^-2|x|, which never overflows; near zero by its series, where that would cancel."""
    size = tl.abs(x)
    shrunk = tl.exp(-2.0 * size)
    large = (1.0 - shrunk) / (1.0 + shrunk)
    square = x * x
    series = -0.33333334 + square * (0.13333334 + square * -0.053968254)
    small = size + size * square * series
    result = tl.where(size < 0.15, small, large)
    return tl.where(x < 0, -result, result)


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """x / (1 + e^-x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x: tl.tensor) -> tl.tensor:
    """x Φ(x), by the error function."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x: tl.tensor) -> tl.tensor:
    """GELU's approximation by a tanh."""
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
