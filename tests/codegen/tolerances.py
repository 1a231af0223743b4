"""How far a kernel may be from its reference, by dtype, and why. The reference computes in fp32.

| dtype | relative | absolute | because |
|---|---|---|---|
| float32 | 2e-5 | 5e-6 | a few hundred fp32 terms are summed in another order; exp2 for exp |
| bfloat16 | 2^-7 | 1e-2 | the result is rounded to 8 bits, and so are softmax weights before they meet |
| | | | values of up to 4: 2^-9 of each, 4 · 2^-9 at worst |
| float16 | 2^-10 | 1.5e-3 | the same with 11 bits |

An lse is fp32 and comes from fp32 scores whatever the inputs' dtype is: products of 16-bit numbers are
exact. Tests of mutated kernels show that each bound fails on a wrong result.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "assert_near"]

TOLERANCES = {
    torch.float32: {"rtol": 2e-5, "atol": 5e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-2},
    torch.float16: {"rtol": 2**-10, "atol": 1.5e-3},
}
"""Arguments of `torch.testing.assert_close` by the dtype that limits accuracy."""


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises AssertionError where `actual` is NaN, of another shape, or too far off.

    Args:
        dtype: of the inputs; None = of `actual`.
    """
    allowed = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), **allowed)
