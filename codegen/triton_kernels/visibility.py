"""Which entries a query sees, inside a kernel: tile by tile, and the ranges that bound a loop.

The rules are those of `rewriter.dialect.attention.visible`, and one more:

| mask | query at position i sees the entry at position j when |
|---|---|
| `sinks_window` | j <= i and (i - span < j or j < num_sink_tokens) |

A position of -1 is padding or an empty entry: it sees nothing and nothing sees it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rewriter.dialect.attention import MASKS as DIALECT_MASKS
from rewriter.dialect.attention import visible

__all__ = ["MASKS", "entry_range", "query_range", "sees", "structure"]

MASKS = (*DIALECT_MASKS, "sinks_window")
"""Mask kinds that kernels know; all but `full` and `causal` use the span."""


def structure(
    q_positions: Tensor, k_positions: Tensor, mask: str, span: int, num_sink_tokens: int
) -> Tensor:
    """The same in PyTorch: bool [..., q_len, kv_len] from positions [..., q_len] and [..., kv_len]."""
    if mask != "sinks_window":
        return visible(q_positions, k_positions, mask, span)
    window = visible(q_positions, k_positions, "sliding_window", span)
    sinks = visible(q_positions, k_positions, "causal", 0)
    return window | (sinks & (k_positions.unsqueeze(-2) < num_sink_tokens))


@triton.jit
def sees(
    i: tl.tensor,
    j: tl.tensor,
    MASK: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_SINK_TOKENS: tl.constexpr,
) -> tl.tensor:
    """bool [M, N] from positions i [M, 1] and j [1, N]."""
    keep = (i >= 0) & (j >= 0)
    if MASK == "causal":
        keep = keep & (j <= i)
    elif MASK == "sliding_window":
        keep = keep & (j <= i) & (i - j < SPAN)
    elif MASK == "chunked":
        keep = keep & (j <= i) & (i // SPAN == j // SPAN)
    elif MASK == "prefix":
        keep = keep & ((j <= i) | (j < SPAN))
    elif MASK == "local":
        keep = keep & (i - j <= SPAN) & (j - i <= SPAN)
    elif MASK == "sinks_window":
        keep = keep & (j <= i) & ((i - j < SPAN) | (j < NUM_SINK_TOKENS))
    return keep


@triton.jit
def entry_range(
    first: tl.tensor, last: tl.tensor, kv_len: tl.tensor, MASK: tl.constexpr, SPAN: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Entries [low, high) outside of which queries at positions first..last see nothing but sinks.

    For entries that stand at positions 0 .. kv_len - 1.
    """
    low = kv_len * 0
    high = kv_len
    if MASK == "sliding_window" or MASK == "sinks_window":
        low = tl.maximum(first - SPAN + 1, 0)
    elif MASK == "chunked":
        low = first // SPAN * SPAN
    elif MASK == "local":
        low = tl.maximum(first - SPAN, 0)
    if MASK == "local":
        high = tl.minimum(last + SPAN + 1, kv_len)
    elif MASK == "prefix":
        high = tl.minimum(tl.maximum(last + 1, SPAN), kv_len)
    elif MASK != "full":
        high = tl.minimum(last + 1, kv_len)
    return tl.minimum(low, high), high


@triton.jit
def query_range(
    first: tl.tensor,
    last: tl.tensor,
    q_end: tl.tensor,
    MASK: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_SINK_TOKENS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Positions [low, high) outside of which no query sees entries at positions first..last.

    For queries that stand at consecutive positions below q_end.
    """
    low = first
    high = q_end
    if MASK == "full":
        low = first * 0
    elif MASK == "prefix":
        low = tl.where(first < SPAN, 0, first)
    elif MASK == "local":
        low = tl.maximum(first - SPAN, 0)
        high = tl.minimum(last + SPAN + 1, q_end)
    elif MASK == "sliding_window":
        high = tl.minimum(last + SPAN, q_end)
    elif MASK == "chunked":
        high = tl.minimum((last // SPAN + 1) * SPAN, q_end)
    elif MASK == "sinks_window":
        high = tl.where(first < NUM_SINK_TOKENS, q_end, tl.minimum(last + SPAN, q_end))
    return low, high
