"""Attention over sink tokens and a ring of recent ones, positions being ranks in the cache.

The cache of a layer holds keys before their rotation: `num_sink_tokens` slots for the first
positions, `recent_window` slots for the last ones (position p in slot S + (p - S) mod W), and one
spare slot that takes the writes of padding and is never read. A query at true position p sees the
sinks and positions p - W < j <= p. Its rank, and theirs, is the place in that cache:

    shift(p)  = max(0, p + 1 - (S + W))
    rank      = p - shift(p) for the query, j - shift(p) for recent entries, j for sinks

Rotation is relative, so several queries share one rotation of the recent keys: with base = shift of
the first of them, recent keys turn to j - base, queries to p - base against those ("near") and to
p - shift(p) against the sinks ("far"). Source: https://arxiv.org/abs/2309.17453
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rewriter.cost.cost import Cost
from rewriter.dialect.grouped import attend_grouped
from rewriter.dialect.registry import dialect_op, nbytes
from rewriter.errors import InputError

__all__ = ["streaming_attention", "streaming_entries"]


def _slots(positions: Tensor, num_sink_tokens: int, recent_window: int) -> Tensor:
    """The slot of each position; padding goes to the spare slot."""
    ring = num_sink_tokens + (positions - num_sink_tokens) % recent_window
    slots = torch.where(positions < num_sink_tokens, positions, ring)
    return torch.where(positions < 0, num_sink_tokens + recent_window, slots)


def _entries_cost(slot_positions: Tensor, q_positions: Tensor, **_: int) -> Cost:
    return Cost(0.0, nbytes(slot_positions, q_positions) * (2 + q_positions.shape[1]), 1)


def _fake_entries(
    slot_positions: Tensor, q_positions: Tensor, *, num_sink_tokens: int, recent_window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch_size, q_len = q_positions.shape
    kv_len = num_sink_tokens + recent_window + (0 if q_len == 1 else q_len)
    distance = q_positions.new_empty((batch_size, q_len, kv_len))
    ranks = q_positions.new_empty((batch_size, kv_len + 2 * q_len))
    mask = distance.new_empty((batch_size, 1, q_len, kv_len), dtype=torch.float32)
    return torch.empty_like(q_positions), distance, mask, ranks


@dialect_op(
    "streaming_entries(Tensor(a!) slot_positions, Tensor q_positions, *, int num_sink_tokens,"
    " int recent_window) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_entries,
    cost=_entries_cost,
)
def streaming_entries(
    slot_positions: Tensor, q_positions: Tensor, *, num_sink_tokens: int, recent_window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Book-keeping of one call, shared by all layers: which entries there are and where they stand.

    One new token is written first and attends over the slots: kv_len = S + W. Several attend over
    the slots as they were and then over themselves: kv_len = S + W + q_len.

    Args:
        slot_positions: int64 [batch_size, S + W + 1], position in each slot, -1 = empty; mutated.
        q_positions: int64 [batch_size, q_len], -1 = padding; q_len <= W, ascending by one in a row.

    Returns:
        slots int64 [batch_size, q_len]: where the new entries go.
        distance int64 [batch_size, q_len, kv_len]: query's rank minus the entry's.
        mask fp32 [batch_size, 1, q_len, kv_len]: -inf where the entry is not seen, else 0.
        ranks int64 [batch_size, kv_len + 2 * q_len]: entries, then queries near, then far.

    Raises:
        InputError: more new tokens than the window has slots.
    """
    if q_positions.shape[1] > recent_window:
        raise InputError(
            f"{q_positions.shape[1]} new tokens in one call exceed the ring of {recent_window}"
        )
    budget = num_sink_tokens + recent_window
    slots = _slots(q_positions, num_sink_tokens, recent_window)
    if q_positions.shape[1] == 1:
        slot_positions.scatter_(1, slots, q_positions)
        entries, first = slot_positions[:, :budget], q_positions
    else:
        entries = torch.cat((slot_positions[:, :budget], q_positions), dim=1)
        slot_positions.scatter_(1, slots, q_positions)
        never = torch.iinfo(torch.int64).max
        first = torch.where(q_positions < 0, never, q_positions).amin(1, keepdim=True)
    base, shift = ((p - (budget - 1)).clamp_min(0) for p in (first, q_positions))
    keys = torch.where(entries < num_sink_tokens, entries, entries - base)
    ranks = torch.cat((keys, q_positions - base, q_positions - shift), dim=1).clamp_min_(0)
    distance = q_positions.unsqueeze(2) - entries.unsqueeze(1)
    hidden = (distance < 0) | (entries < 0).unsqueeze(1)
    hidden[..., num_sink_tokens:] |= distance[..., num_sink_tokens:] >= recent_window
    distance[..., :num_sink_tokens] -= shift.unsqueeze(2)
    mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -math.inf)
    return slots, distance, mask.unsqueeze(1), ranks


def _full_width(cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Tables [..., rotary_dim] by which x · cos + swap(x) · sin turns x."""
    if interleaved:
        return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`rope` with tables of full width: three passes over x instead of eleven."""
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    if interleaved:
        swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        half = width // 2
        swapped = torch.cat((turned[..., half:], turned[..., :half]), dim=-1)
    out = torch.addcmul(turned * cos, swapped.to(cos.dtype), sin).to(x.dtype)
    return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), dim=-1)


def _rotate(
    q: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, num_sink_tokens: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned to their ranks; twice as wide when queries have two frames.

    In the wide form recent keys stand in the first half and sinks in the second, zeros elsewhere,
    so that one product gives near scores for the former and far scores for the latter.
    """
    q_len, kv_len, dim = q.shape[2], keys.shape[2], keys.shape[3]
    cos, sin = _full_width(cos, sin, interleaved)

    def turn(x: Tensor, first: int) -> Tensor:
        at = slice(first, first + x.shape[2])
        return _turn(x, cos[..., at, :], sin[..., at, :], interleaved)

    keys, near = turn(keys, 0), turn(q, kv_len)
    if q_len == 1 or num_sink_tokens == 0:
        return near, keys
    wide = keys.new_zeros((*keys.shape[:3], 2 * dim))
    wide[:, :, num_sink_tokens:, :dim] = keys[:, :, num_sink_tokens:]
    wide[:, :, :num_sink_tokens, dim:] = keys[:, :, :num_sink_tokens]
    return torch.cat((near, turn(q, kv_len + q_len)), dim=-1), wide


def _store(ring: Tensor, new: Tensor, slots: Tensor) -> None:
    """ring[b, h, slots[b, i]] = new[b, h, i]."""
    ring.scatter_(2, slots[:, None, :, None].expand(new.shape), new)


def _entries(ring: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """Store the new entries and give the ones to attend: the slots, and the new ones if several."""
    kept = ring[:, :, :-1]
    if new.shape[2] == 1:
        _store(ring, new, slots)
        return kept
    entries = torch.cat((kept, new), dim=2)
    _store(ring, new, slots)
    return entries


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _cost(
    q: Tensor, k: Tensor, v: Tensor, k_ring: Tensor, v_ring: Tensor, *_: object, **__: object
) -> Cost:
    """Both products over the ring, its keys rotated; the ring read once, new entries written."""
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k_ring.shape[2]
    flops = 2.0 * pairs * (q.shape[3] + v.shape[3]) + 3.0 * k_ring.numel()
    return Cost(flops, nbytes(k_ring, v_ring) + 2 * nbytes(q, k, v), 1)


@dialect_op(
    "streaming_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_ring, Tensor(b!) v_ring,"
    " Tensor slots, Tensor distance, Tensor mask, Tensor? cos=None, Tensor? sin=None,"
    " Tensor? sinks=None, Tensor? slopes=None, *, float softmax_scale, int num_sink_tokens,"
    " bool interleaved=False, SymInt span=0, float softcap=0.0) -> Tensor",
    fake=_fake,
    cost=_cost,
)
def streaming_attention(
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
    *,
    softmax_scale: float,
    num_sink_tokens: int,
    interleaved: bool = False,
    span: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Store the new keys and values and attend over the sinks and the recent window.

    Args:
        q, k, v: bhsd [batch_size, num_heads or num_kv_heads, q_len, head_dim], before rotation.
        k_ring, v_ring: bhsd [batch_size, num_kv_heads, S + W + 1, head_dim], mutated.
        slots, distance, mask: from `streaming_entries`.
        cos, sin: tables at its `ranks`, broadcast to [batch_size, heads, kv_len + 2 * q_len,
            rotary_dim / 2]; None when the layer does not rotate.
        sinks: [num_heads] logits in the denominator.
        slopes: [num_heads] ALiBi slopes on the distance.
        span: the model's own sliding window, applied to the distance; 0 = none.

    Returns:
        bhsd [batch_size, num_heads, q_len, value width]; padding gives zero rows.
    """
    keys, values = _entries(k_ring, k, slots), _entries(v_ring, v, slots)
    if cos is not None and sin is not None:
        q, keys = _rotate(q, keys, cos, sin, num_sink_tokens, interleaved)
    if span:
        mask = mask.masked_fill((distance >= span).unsqueeze(1), -math.inf)
    if slopes is not None:
        mask = mask - slopes.float().view(1, -1, 1, 1) * distance.unsqueeze(1)
    elif not span:
        mask = mask.to(q.dtype)
    return attend_grouped(q, keys, values, None, mask, sinks, softmax_scale, softcap)
