"""Products with weights.

`linear` stands where references multiply; as an operator it is one call to torch.compile, which has
no kernel of its own for few rows.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.cost.cost import Cost
from rewriter.dialect.registry import dialect_op, nbytes

__all__ = ["linear", "linear_op"]

LARGE = 2**19
"""Elements of a weight from which oneDNN is the quicker one; smaller ones stay in the cache."""

_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, x [..., in], weight [out, in]; where large in another order of rounding.

    On the CPU, PyTorch gives fp32 products to MKL, which reads the weight with one thread when x has
    few rows. oneDNN, which PyTorch comes with and uses for bf16, reads it with all.
    """
    large = weight.numel() >= LARGE and _is_plain(x) and _is_plain(weight)
    if not (_ONEDNN and large):
        return functional.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return linear_op.overload(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Cost:
    rows = x.numel() // x.shape[-1]
    moved = nbytes(x, weight, bias) + rows * weight.shape[0] * x.element_size()
    return Cost(2.0 * rows * weight.numel(), moved, 1)


linear_op = dialect_op(
    "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    fake=_fake,
    cost=_cost,
    traceable=False,
)(linear)
