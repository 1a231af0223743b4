"""The product of two tiles, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "product"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on a machine without a GPU."""


@triton.jit
def product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a [M, K] times b [K, N], accumulated in fp32; fp32 inputs are not rounded to tf32."""
    if INTERPRETED:  # which multiplies the bits of bf16 as if they were integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
