"""State that goes in and comes out: entries joined, and attention over a ring of slots.

The references write the slots in place and join them with the new entries. Here both stay where they
are: a query's scores on the slots and on the new entries are joined instead, which are few numbers, and
so are its weights divided. Entries come in the order (slots, the spare one included; new ones).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codegen.onnx_functions.rope import turn
from rewriter.dialect.streaming import _slots

__all__ = ["append_entries", "attend_ring", "entries_mask", "streaming_entries"]


def append_entries(past: Tensor, new: Tensor) -> Tensor:
    """bhsd entries [..., past + q_len, width]."""
    return torch.cat((past, new), dim=2)


def streaming_entries(
    slot_positions: Tensor, q_positions: Tensor, *, num_sink_tokens: int, recent_window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`rewriter::streaming_entries` with kv_len = S + W + 1 + q_len, and the positions afterwards."""
    budget = num_sink_tokens + recent_window
    slots = _slots(q_positions, num_sink_tokens, recent_window)
    entries = torch.cat((slot_positions, q_positions), dim=1)
    never = torch.iinfo(torch.int64).max
    first = torch.where(q_positions < 0, never, q_positions).amin(1, keepdim=True)
    base, shift = ((p - (budget - 1)).clamp_min(0) for p in (first, q_positions))
    keys = torch.where(entries < num_sink_tokens, entries, entries - base)
    ranks = torch.cat((keys, q_positions - base, q_positions - shift), dim=1).clamp_min(0)
    distance = q_positions.unsqueeze(2) - entries.unsqueeze(1)
    hidden = (distance < 0) | (entries < 0).unsqueeze(1)
    sink = torch.arange(entries.shape[1], device=entries.device) < num_sink_tokens
    hidden = hidden | (~sink & (distance >= recent_window))
    distance = torch.where(sink, distance - shift.unsqueeze(2), distance)
    return (
        slots,
        distance,
        entries_mask(hidden),
        ranks,
        slot_positions.scatter(1, slots, q_positions),
    )


def entries_mask(hidden: Tensor) -> Tensor:
    """fp32 [batch_size, 1, q_len, kv_len]: -inf where hidden. A row of padding sees everything."""
    hidden = hidden & ~hidden.all(2, keepdim=True)
    return torch.where(hidden, -math.inf, 0.0).unsqueeze(1)


def attend_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    slots: Tensor,
    distance: Tensor,
    mask: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    ranks: Tensor | None = None,
    *,
    softmax_scale: float,
    num_sink_tokens: int,
    interleaved: bool = False,
    span: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rewriter::streaming_attention`, and the slots afterwards.

    Args:
        cos, sin: at the ranks [batch_size or 1, 1, kv_len + 2 * q_len, width]; with `ranks` int64
            [batch_size, kv_len + 2 * q_len] tables [rows, width].
    """
    at = slots[:, None, :, None].expand(k.shape)
    stored = (k_ring.scatter(2, at, k), v_ring.scatter(2, at, v))
    capacity, q_len = k_ring.shape[2], q.shape[2]
    near = far = q
    if cos is not None and sin is not None:

        def turned(x: Tensor, first: int, length: int) -> Tensor:
            if ranks is not None:
                return turn(x, cos, sin, ranks[:, first : first + length], interleaved=interleaved)
            at_cos, at_sin = (t.squeeze(1)[:, first : first + length] for t in (cos, sin))
            return turn(x, at_cos, at_sin, None, interleaved=interleaved)

        k_ring, k = turned(k_ring, 0, capacity), turned(k, capacity, q_len)
        near, far = (turned(q, capacity + q_len * times, q_len) for times in (1, 2))
    if span:
        mask = torch.where((distance >= span).unsqueeze(1), -math.inf, mask)
    if slopes is not None:
        mask = mask - slopes.float().view(1, -1, 1, 1) * distance.unsqueeze(1)
    scores = _scores(near, far, k_ring, k, num_sink_tokens) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = _weights(scores + mask, sinks).to(v.dtype)
    out = _product(weights[..., :capacity], v_ring) + _product(weights[..., capacity:], v)
    return out, *stored


def _scores(near: Tensor, far: Tensor, k_ring: Tensor, k: Tensor, num_sink_tokens: int) -> Tensor:
    """fp32 [batch_size, num_heads, q_len, kv_len]; sinks meet the query in its far frame."""
    ring, new = (_product(near, keys.transpose(2, 3)) for keys in (k_ring, k))
    if near is far or num_sink_tokens == 0:
        return torch.cat((ring, new), dim=3).float()
    first = _product(far, k_ring[:, :, :num_sink_tokens].transpose(2, 3))
    return torch.cat((first, ring[..., num_sink_tokens:], new), dim=3).float()


def _product(rows: Tensor, shared: Tensor) -> Tensor:
    """[b, num_heads, q_len, n] @ [b, num_kv_heads, n, m], the heads of a group being rows of one."""
    b, num_heads, q_len, n = rows.shape
    num_kv_heads = shared.shape[1]
    if num_heads == num_kv_heads:
        return torch.matmul(rows, shared)
    folded = rows.reshape(b, num_kv_heads, num_heads // num_kv_heads * q_len, n)
    return torch.matmul(folded, shared).reshape(b, num_heads, q_len, shared.shape[3])


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax, with the logits of the sinks in the denominator only."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    rows = (scores.shape[0], scores.shape[1], scores.shape[2], 1)
    sink = sinks.float().view(1, -1, 1, 1).expand(rows)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
