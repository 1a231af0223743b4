"""Scaled dot-product attention as one operator: grouped heads, soft-cap, sinks, ALiBi.

The mask is structure, not a tensor: its kind and span say which positions see which.

| mask | query at position i sees the entry at position j when |
|---|---|
| `full` | always |
| `causal` | j <= i |
| `sliding_window` | i - span < j <= i |
| `chunked` | j <= i and i // span == j // span |
| `prefix` | j <= i or j < span |
| `local` | abs(i - j) <= span |

Anything else stays a tensor, in `bias`. Source: https://arxiv.org/abs/1706.03762
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.cost.cost import Cost
from rewriter.dialect.registry import dialect_op, nbytes

__all__ = [
    "ATTENTION_SCHEMA",
    "MASKS",
    "attend",
    "attention",
    "attention_cost",
    "position_grid",
    "repeat_kv",
    "visible",
]

MASKS = ("full", "causal", "sliding_window", "chunked", "prefix", "local")
"""Mask kinds; all but `full` and `causal` use `span`."""

ATTENTION_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? q_positions=None, Tensor? k_positions=None,"
    " Tensor? bias=None, Tensor? sinks=None, Tensor? slopes=None, *, float softmax_scale,"
    " str mask, SymInt span=0, float softcap=0.0) -> Tensor"
)


def visible(q_positions: Tensor, k_positions: Tensor, mask: str, span: int) -> Tensor:
    """Which entries each query sees.

    Args:
        q_positions: [..., q_len], k_positions: [..., kv_len]; -1 marks padding or an empty entry.
        mask: one of `MASKS`; span: its window, chunk or prefix length.

    Returns:
        bool [..., q_len, kv_len].
    """
    i, j = q_positions.unsqueeze(-1), k_positions.unsqueeze(-2)
    rule = {
        "full": lambda: torch.ones_like(i >= j),
        "causal": lambda: j <= i,
        "sliding_window": lambda: (j <= i) & (i - j < span),
        "chunked": lambda: (j <= i) & (i // max(span, 1) == j // max(span, 1)),
        "prefix": lambda: (j <= i) | (j < span),
        "local": lambda: (i - j).abs() <= span,
    }[mask]()
    return rule & (j >= 0) & (i >= 0)


def position_grid(
    q: Tensor, k: Tensor, q_positions: Tensor | None, k_positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Positions [batch or 1, q_len] and [batch or 1, kv_len]; None = the last q_len of kv_len."""
    kv_len, q_len = k.shape[2], q.shape[2]
    if k_positions is None:
        k_positions = torch.arange(kv_len, device=k.device).unsqueeze(0)
    if q_positions is None:
        q_positions = torch.arange(kv_len - q_len, kv_len, device=q.device).unsqueeze(0)
    return q_positions, k_positions


def repeat_kv(x: Tensor, num_heads: int) -> Tensor:
    """bhsd keys or values repeated so that query head h finds its KV head h // group_size at h."""
    group_size = num_heads // x.shape[1]
    return x if group_size == 1 else x.repeat_interleave(group_size, dim=1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    softcap: float,
) -> Tensor:
    """The explicit form: fp32 softmax, rows that see nothing give zero.

    `keep` bool and `bias` broadcast to [batch_size, num_heads, q_len, kv_len]; sinks [num_heads].
    """
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - peak)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return torch.matmul(weights[..., : k.shape[2]].to(v.dtype), v)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def attention_cost(q: Tensor, k: Tensor, v: Tensor, *_: object, **options: object) -> Cost:
    """Both products over every visible pair; q, k, v read and the output written once."""
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if options.get("mask") == "causal" and q.shape[2] == k.shape[2]:
        pairs = pairs / 2
    out_bytes = q.element_size() * q.shape[0] * q.shape[1] * q.shape[2] * v.shape[3]
    return Cost(2.0 * pairs * (q.shape[3] + v.shape[3]), nbytes(q, k, v) + out_bytes, 1)


def _repeating_cost(q: Tensor, k: Tensor, v: Tensor, *rest: object, **options: object) -> Cost:
    """Also the copies of K and V for every head of a group, written and read."""
    group_size = q.shape[1] // k.shape[1]
    copies = 2.0 * group_size * nbytes(k, v) if group_size > 1 else 0.0
    return attention_cost(q, k, v, *rest, **options) + Cost(0.0, copies, 2 if copies else 0)


@dialect_op("attention" + ATTENTION_SCHEMA, fake=_fake, cost=_repeating_cost)
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
    """softmax(softcap(q kᵀ · softmax_scale) + bias, masked) v, K and V repeated over each group.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim].
        k, v: bhsd [batch_size, num_kv_heads, kv_len, head_dim]; v may be of another width.
        q_positions, k_positions: int64 [batch_size, q_len] and [batch_size, kv_len], -1 = padding
            or empty; None means that the queries are the last q_len of kv_len contiguous entries.
        bias: added to the scores, or bool (True = visible); broadcasts to
            [batch_size, num_heads, q_len, kv_len].
        sinks: [num_heads] logits that take part in the softmax's denominator only.
        slopes: [num_heads] ALiBi slopes: slope · (j - i) is added.
        mask, span: which positions see which (the module's table).
        softcap: 0 for none, otherwise scores become softcap · tanh(scores / softcap).

    Returns:
        bhsd [batch_size, num_heads, q_len, value width]; rows that see nothing are zero.
    """
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    structural = q_positions is None and k_positions is None and slopes is None
    fusable = structural and bias is None and sinks is None and not softcap
    if fusable and (mask == "full" or (mask == "causal" and q.shape[2] in (1, k.shape[2]))):
        causal = mask == "causal" and q.shape[2] > 1
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=softmax_scale
        )
    at, entries = position_grid(q, k, q_positions, k_positions)
    everywhere = mask == "full" and q_positions is None and k_positions is None
    keep = None if everywhere else visible(at, entries, mask, span).unsqueeze(1)
    if slopes is not None:
        distance = (entries.unsqueeze(-2) - at.unsqueeze(-1)).unsqueeze(1)
        alibi = slopes.float().view(1, -1, 1, 1) * distance
        bias = alibi if bias is None else bias + alibi
    if bias is not None and bias.dtype == torch.bool:
        keep, bias = bias if keep is None else keep & bias, None
    return attend(q, k, v, keep, bias, sinks, softmax_scale, softcap)
