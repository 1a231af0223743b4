"""Weights as int8 rows with one fp32 scale each.

A graph keeps what reads a weight as it is and puts `dequantize_rows` in front of it, so that whatever
knows a product still finds one. Backends take the two together: `linear` of an `Int8Matrix` and the
compiled step read the int8 rows themselves, and nothing is ever as large as the original.

Source: https://arxiv.org/abs/2208.07339, section 2 (one scale for each row).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rewriter.cost.cost import Cost
from rewriter.dialect.registry import dialect_op, nbytes
from rewriter.errors import InputError

__all__ = ["Int8Matrix", "dequantize_rows", "int8_embedding", "quantize_rows"]

BLOCK = 2**20
"""Elements that are quantised at a time: temporaries stay in the cache."""


class Int8Matrix(NamedTuple):
    """A weight [out, in] that was not made wide: what `dequantize_rows` takes, in its order."""

    weight: Tensor
    scale: Tensor


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights [out_size, in_size] and the scale [out_size] of each row, fp32.

    Symmetric: the largest magnitude of a row becomes 127. A row of zeros has scale 1. The error of a
    weight is at most half of its row's scale.

    Raises:
        InputError: weights that are no matrix of finite floats.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.isfinite().all():
        told = f"{tuple(weight.shape)} {weight.dtype}"
        raise InputError(f"weight={told} is not allowed: a matrix of finite floats")
    if weight.shape[1] == 0:
        return weight.to(torch.int8), torch.ones(len(weight), device=weight.device)
    blocks = [_quantized(part) for part in weight.detach().split(max(1, BLOCK // weight.shape[1]))]
    rows, scale = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return rows, scale


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.float()
    largest = wide.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def _fake_rows(weight: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _cost_rows(weight: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Cost:
    moved = nbytes(weight, scale) + weight.numel() * dtype.itemsize
    return Cost(float(weight.numel()), moved, 1)


@dialect_op(
    "dequantize_rows(Tensor weight, Tensor scale, *, ScalarType dtype) -> Tensor",
    fake=_fake_rows,
    cost=_cost_rows,
)
def dequantize_rows(weight: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """weight · scale, row by row, in `dtype`.

    Args:
        weight: int8 [out, in]. scale: fp32 [out].
    """
    if dtype == torch.float64:
        return weight.double() * scale.double()[:, None]
    return (weight.float() * scale[:, None]).to(dtype)


def _fake_embedding(weight: Tensor, scale: Tensor, ids: Tensor, *, dtype: torch.dtype) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=dtype)


def _cost_embedding(weight: Tensor, scale: Tensor, ids: Tensor, *, dtype: torch.dtype) -> Cost:
    count, width = float(ids.numel()), weight.shape[1]
    return Cost(count * width, count * (width + 4 + width * dtype.itemsize) + nbytes(ids), 1)


@dialect_op(
    "int8_embedding(Tensor weight, Tensor scale, Tensor ids, *, ScalarType dtype) -> Tensor",
    fake=_fake_embedding,
    cost=_cost_embedding,
)
def int8_embedding(weight: Tensor, scale: Tensor, ids: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Rows of a table: weight[ids] · scale[ids] in `dtype`.

    Args:
        weight: int8 [rows, width]. scale: fp32 [rows]. ids: int64 [...], each below `rows`.

    Returns:
        [..., width].
    """
    return (weight[ids].float() * scale[ids].unsqueeze(-1)).to(dtype)
