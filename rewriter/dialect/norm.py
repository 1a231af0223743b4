"""Root-mean-square and layer normalisation over the last dimension.

Sources: https://arxiv.org/abs/1910.07467, https://arxiv.org/abs/1607.06450
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.cost.cost import Cost
from rewriter.dialect.registry import dialect_op, nbytes

__all__ = ["layer_norm", "rms_norm"]


def _fake_rms(x: Tensor, weight: Tensor | None = None, **_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _cost_rms(x: Tensor, weight: Tensor | None = None, **_: object) -> Cost:
    return Cost(4.0 * x.numel(), 2 * nbytes(x) + nbytes(weight), 1)


@dialect_op(
    "rms_norm(Tensor x, Tensor? weight=None, *, float eps, float weight_offset=0.0,"
    " bool wide_weight=False) -> Tensor",
    fake=_fake_rms,
    cost=_cost_rms,
)
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    wide_weight: bool = False,
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (weight_offset + weight), in fp32, cast back to x's dtype.

    Args:
        x: [..., width]. weight: [width] or None for 1. weight_offset: Gemma's 1 in (1 + weight).
        wide_weight: multiply by the weight before the cast back; with an offset it always is.
    """
    wide = x.float()
    out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return out.to(x.dtype)
    if weight_offset or wide_weight:
        return (out * (weight_offset + weight.float())).to(x.dtype)
    return weight * out.to(x.dtype)


def _fake_layer(x: Tensor, *_: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _cost_layer(x: Tensor, *weights: Tensor | None, eps: float) -> Cost:
    return Cost(7.0 * x.numel(), 2 * nbytes(x) + nbytes(*weights), 1)


@dialect_op(
    "layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, *, float eps) -> Tensor",
    fake=_fake_layer,
    cost=_cost_layer,
)
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dimension; x [..., width]."""
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
