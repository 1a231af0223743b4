"""Rotary position embedding of the leading dimensions of each head.

Source: https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.cost.cost import Cost
from rewriter.dialect.registry import dialect_op, nbytes

__all__ = ["rope"]


def _fake(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    return torch.empty_like(x)


def _cost(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Cost:
    return Cost(3.0 * x.numel(), 2 * nbytes(x) + nbytes(cos, sin), 1)


@dialect_op(
    "rope(Tensor x, Tensor cos, Tensor sin, *, bool interleaved) -> Tensor", fake=_fake, cost=_cost
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs of dimensions of x by the angles whose cosine and sine are given.

    Args:
        x: [..., head_dim].
        cos, sin: broadcast to [..., rotary_dim / 2]; rotary_dim <= head_dim, dimensions beyond
            it pass through. Any attention scaling (YaRN) is already multiplied in.
        interleaved: pairs are (2i, 2i+1); otherwise (i, i + rotary_dim / 2).

    Returns:
        like x; computed in the wider of x's and the table's dtype.
    """
    rotary_dim = 2 * cos.shape[-1]
    rotated = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    out = joined.to(x.dtype)
    return out if rotated is x else torch.cat((out, x[..., rotary_dim:]), dim=-1)
