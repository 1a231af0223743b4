"""Attention over all entries as ONNX's Attention, whatever the mask.

The mask is built once for all layers that see alike (`seen`). Sinks become one more entry, a key of
zeros whose bias is the logit. A query of padding sees everything: its result means nothing, and without
an entry to see it would be no number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codegen.onnx_functions.node import node
from rewriter.dialect.attention import position_grid, visible

__all__ = ["attention", "attention_masked", "seen"]


def seen(q_positions: Tensor, k_positions: Tensor, *, mask: str, span: int) -> Tensor:
    """Who sees what, bool [batch_size, 1, q_len, kv_len]."""
    keep = visible(q_positions, k_positions, mask, span)
    return (keep | (q_positions < 0).unsqueeze(-1)).unsqueeze(1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    softmax_scale: float,
    mask: str,
    span: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """`rewriter::attention` and `rewriter::grouped_attention`."""
    keep: Tensor | None = None
    everywhere = mask == "full" and q_positions is None and k_positions is None
    if not everywhere or slopes is not None:
        at, entries = position_grid(q, k, q_positions, k_positions)
        q_positions, k_positions = at, entries
        keep = None if everywhere else seen(at, entries, mask=mask, span=span)
    return attention_masked(
        q,
        k,
        v,
        keep,
        q_positions,
        k_positions,
        bias,
        sinks,
        slopes,
        softmax_scale=softmax_scale,
        softcap=softcap,
    )


def attention_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    *,
    softmax_scale: float,
    softcap: float,
) -> Tensor:
    """The same with `keep` from `seen`; None = everything."""
    if bias is not None and bias.dtype == torch.bool:
        keep, bias = bias if keep is None else keep & bias, None
    added = _added(q, keep, q_positions, k_positions, bias, sinks, slopes)
    if sinks is not None:
        k, v = (_with_zeros(x) for x in (k, v))
    attended = keep if added is None else added
    inputs = (q, k, v) if attended is None else (q, k, v, _four(attended))
    shape = (q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    return node(
        "Attention",
        inputs,
        shape,
        q.dtype,
        scale=softmax_scale,
        softcap=softcap,
        softmax_precision=1,
    )


def _four(mask: Tensor) -> Tensor:
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _added(
    q: Tensor,
    keep: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor | None:
    """What is added to the scores, hidden entries included; None where `keep` says it all."""
    total = bias
    if slopes is not None:
        assert q_positions is not None and k_positions is not None
        distance = (k_positions.unsqueeze(-2) - q_positions.unsqueeze(-1)).unsqueeze(1)
        alibi = slopes.float().view(1, -1, 1, 1) * distance
        total = alibi if total is None else total + alibi
    if sinks is not None and total is None:
        total = torch.zeros((), dtype=q.dtype)
    if total is None:
        return None
    if keep is not None:
        total = torch.where(keep, total, -math.inf)
    if sinks is not None:
        total = _with_sinks(total, q, sinks)
    return total.to(q.dtype)


def _with_sinks(total: Tensor, q: Tensor, sinks: Tensor) -> Tensor:
    """Another column, the logit of each head."""
    rows = (q.shape[0], q.shape[1], q.shape[2])
    column = sinks.to(total.dtype).view(1, -1, 1, 1).expand(*rows, 1)
    return torch.cat((_four(total).expand(*rows, -1), column), dim=-1)


def _with_zeros(x: Tensor) -> Tensor:
    """bhsd with another entry of zeros."""
    return torch.cat((x, x.new_zeros((x.shape[0], x.shape[1], 1, x.shape[3]))), dim=2)
