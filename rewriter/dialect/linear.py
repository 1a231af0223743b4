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
from rewriter.dialect.int8 import Int8Matrix
from rewriter.dialect.registry import dialect_op, nbytes

__all__ = ["int8_linear", "linear", "linear_op"]

LARGE = 2**19
"""Elements of a weight from which oneDNN is the quicker one; smaller ones stay in the cache."""

INT8_BLOCK = 2**20
"""Elements of int8 rows that are made wide at a time: they are multiplied while they lie in the cache."""

FEW_ROWS = 32
"""Rows of x up to which PyTorch's own product of bfloat16 and int8 is the quicker one."""

PACKED = 32
"""Extents of which it takes multiples; others it reads out of bounds (torch 2.13)."""

_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def linear(x: Tensor, weight: Tensor | Int8Matrix, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, x [..., in], weight [out, in]; where large in another order of rounding.

    On the CPU, PyTorch gives fp32 products to MKL, which reads the weight with one thread when x has
    few rows. oneDNN, which PyTorch comes with and uses for bf16, reads it with all.
    """
    if isinstance(weight, Int8Matrix):
        compiling = torch.compiler.is_compiling()
        return (int8_linear.overload if compiling else int8_linear.reference)(x, *weight, bias)
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


def _fake_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _cost_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Cost:
    plain = _cost(x, weight, bias)
    return Cost(plain.flops, plain.bytes_moved + nbytes(scale), 1)


@dialect_op(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor",
    fake=_fake_int8,
    cost=_cost_int8,
    traceable=False,
)
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """scale · (x weightᵀ) + bias; the int8 rows are multiplied as they are, exact in x's dtype.

    Args:
        x: [..., in]. weight: int8 [out, in]. scale: fp32 [out].
    """
    flat = x.reshape(-1, x.shape[-1])
    product = _int8_product(flat, weight) * scale
    product = product if bias is None else product + bias
    return product.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] times int8 weights [out, in], block by block."""
    packed = weight.is_contiguous() and not any(extent % PACKED for extent in weight.shape)
    if packed and x.is_cpu and x.dtype == torch.bfloat16 and 0 < len(x) <= FEW_ROWS:
        return torch._weight_int8pack_mm(x.contiguous(), weight, x.new_ones(len(weight)))
    blocks = weight.split(max(1, INT8_BLOCK // max(1, weight.shape[1])))
    return torch.cat([linear(x, block.to(x.dtype)) for block in blocks], dim=1)
