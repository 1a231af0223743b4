"""Attention and its cache as ONNX Runtime's GroupQueryAttention: rotation, append, window and sinks in one.

The first entries of a row are its tokens, the new ones behind them; padding stands behind and is
overwritten. Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codegen.onnx_functions.node import MICROSOFT, nodes
from rewriter.dialect.attention import visible

__all__ = ["entry_bias", "entry_counts", "grouped_query", "merge_heads", "split_heads"]


def entry_counts(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of each row less one, int32 [batch_size], and columns of the mask, int32 []."""
    counts = (attention_mask.sum(1) - 1).to(torch.int32)
    total = torch.full((), attention_mask.shape[1], dtype=torch.int32)
    return counts, total


def entry_bias(
    q_positions: Tensor, k_positions: Tensor, slopes: Tensor | None, *, mask: str, span: int
) -> Tensor:
    """What the operator has no attribute for, added to the scores: ALiBi, and who else is hidden.

    Returns:
        fp32 [batch_size, num_heads or 1, q_len, kv_len].
    """
    bias = torch.zeros((), dtype=torch.float32)
    if slopes is not None:
        distance = (k_positions.unsqueeze(-2) - q_positions.unsqueeze(-1)).unsqueeze(1)
        bias = slopes.float().view(1, -1, 1, 1) * distance
    if mask in ("causal", "sliding_window"):
        return bias
    keep = visible(q_positions, k_positions, mask, span).unsqueeze(1)
    return torch.where(keep, bias, -math.inf)


def grouped_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    counts: Tensor,
    total: Tensor,
    attention_mask: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    *,
    num_heads: int,
    softmax_scale: float,
    softcap: float,
    window: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [batch_size, q_len, num_heads * head_dim] and both caches afterwards.

    Args:
        q, k, v: [batch_size, q_len, heads * head_dim], not rotated where `cos` and `sin` are given,
            tables [positions, width].
        past_k, past_v: bhsd. counts, total: of `entry_counts`.
        bias: added to the scores. sinks: [num_heads]. window: entries seen, -1 = all.
    """
    num_kv_heads, head_dim = past_k.shape[1], past_k.shape[3]
    present = (past_k.shape[0], num_kv_heads, attention_mask.shape[1], head_dim)
    rotate = cos is not None and sin is not None
    tables = (
        (cos.to(q.dtype), sin.to(q.dtype)) if cos is not None and sin is not None else (None, None)
    )
    added = None if bias is None else bias.to(q.dtype)
    logits = None if sinks is None else sinks.to(q.dtype)
    inputs = (q, k, v, past_k, past_v, counts, total, *tables, None, added, logits)
    while inputs[-1] is None:
        inputs = inputs[:-1]
    out, keys, values = nodes(
        f"{MICROSOFT}::GroupQueryAttention",
        inputs,
        (q.shape, present, present),
        (q.dtype, past_k.dtype, past_v.dtype),
        num_heads=num_heads,
        kv_num_heads=num_kv_heads,
        scale=softmax_scale,
        softcap=softcap,
        local_window_size=window,
        do_rotary=int(rotate),
        rotary_interleaved=int(interleaved and rotate),
    )
    return out, keys, values


def merge_heads(x: Tensor) -> Tensor:
    """bhsd as [batch_size, seq, heads * width]."""
    return x.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[batch_size, seq, heads * width] as bhsd."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)
