"""A bounded cache of the last entries and a random part of the older ones.

Every position has a priority, a fixed hash of it and a seed. A query at position p sees the entries
p - W < j <= p and, of all j <= p - W, the R with the largest priorities: at any moment a uniformly
random subset of the past, whatever the chunks it came in. What leaves the window competes with the R
kept ones, and what once was outranked by R older entries stays so: R + W slots hold all that may still
be seen, in any order, and a spare slot takes the writes of padding and of what is not kept.

Control for methods that choose their entries, as in https://github.com/NVIDIA/kvpress (RandomPress).
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from rewriter.cost.cost import Cost
from rewriter.dialect.registry import dialect_op, nbytes

__all__ = ["priorities", "random_entries"]

Numbers = TypeVar("Numbers", int, Tensor)

_WORD = 0xFFFFFFFF
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
"""Factors modulo 2^32 that keep every product of a 32-bit number within int64."""
_FROM_ZERO = 0x9E3779B9
"""Added to the seed: the hash of 0 is 0, and position 0 is to be no exception."""


def _mix(x: Numbers) -> Numbers:
    """Another number below 2^32 for each; https://github.com/skeeto/hash-prospector (lowbias32)."""
    x = ((x ^ (x >> 16)) * _FIRST) & _WORD
    x = ((x ^ (x >> 15)) * _SECOND) & _WORD
    return x ^ (x >> 16)


def priorities(positions: Tensor, seed: int) -> Tensor:
    """What decides which of two older entries stays.

    Args:
        positions: int64, below 2^32. seed: from 0, below 2^32.

    Returns:
        int64 of the same shape, in [0, 2^32), no two positions alike.
    """
    return _mix((positions ^ _mix((seed + _FROM_ZERO) & _WORD)) & _WORD)


def _visible(
    entries: Tensor, queries: Tensor, num_random: int, recent_window: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Distances and whether each query sees each entry, both [batch_size, queries, entries]."""
    distance = queries.unsqueeze(2) - entries.unsqueeze(1)
    real = (entries >= 0).unsqueeze(1)
    older = real & (distance >= recent_window)
    order = priorities(entries, seed).argsort(dim=1, descending=True).unsqueeze(1).expand_as(older)
    ranked = older.gather(2, order)
    chosen = torch.empty_like(older).scatter_(2, order, ranked & (ranked.cumsum(2) <= num_random))
    return distance, chosen | (real & (distance >= 0) & (distance < recent_window))


def _least(kept: Tensor, q_positions: Tensor, recent_window: int, seed: int) -> Tensor:
    """int64 [batch_size, 1]: an empty slot, or that of the older entry with the lowest priority."""
    weight = priorities(kept, seed).masked_fill(q_positions - kept < recent_window, _WORD + 1)
    return weight.masked_fill(kept < 0, -1).argmin(dim=1, keepdim=True)


def _refilled(survives: Tensor, budget: int) -> Tensor:
    """Slots of the new entries: those that survive into slots whose entry does not, in order.

    survives: bool [batch_size, budget + q_len], slots and then new entries.
    """
    old, new = survives[:, :budget], survives[:, budget:]
    free = old.to(torch.int8).argsort(dim=1, stable=True)
    index = (new.cumsum(1) - 1).clamp(0, budget - 1)
    return free.gather(1, index).masked_fill(~new, budget)


def _cost(slot_positions: Tensor, q_positions: Tensor, **_: int) -> Cost:
    return Cost(0.0, nbytes(slot_positions, q_positions) * (2 + q_positions.shape[1]), 1)


def _fake(
    slot_positions: Tensor, q_positions: Tensor, *, num_random: int, recent_window: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, q_len = q_positions.shape
    kv_len = num_random + recent_window + (0 if q_len == 1 else q_len)
    distance = q_positions.new_empty((batch_size, q_len, kv_len))
    mask = distance.new_empty((batch_size, 1, q_len, kv_len), dtype=torch.float32)
    return torch.empty_like(q_positions), distance, mask


@dialect_op(
    "random_entries(Tensor(a!) slot_positions, Tensor q_positions, *, int num_random,"
    " int recent_window, int seed) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    cost=_cost,
)
def random_entries(
    slot_positions: Tensor, q_positions: Tensor, *, num_random: int, recent_window: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Book-keeping of one call, shared by all layers: which entries there are and who sees them.

    One new token is written first and attends over the slots: kv_len = R + W. Several attend over
    the slots as they were and then over themselves: kv_len = R + W + q_len. Entries stay at their
    true positions, so keys are cached as the model made them.

    Args:
        slot_positions: int64 [batch_size, R + W + 1], position in each slot, -1 = empty; mutated.
        q_positions: int64 [batch_size, q_len], -1 = padding, ascending by one in a row.
        num_random: R >= 0. recent_window: W >= 1. seed: in [0, 2^32).

    Returns:
        slots int64 [batch_size, q_len]: where the new entries go.
        distance int64 [batch_size, q_len, kv_len]: query's position minus the entry's.
        mask fp32 [batch_size, 1, q_len, kv_len]: -inf where the entry is not seen, else 0.
    """
    budget, q_len = num_random + recent_window, q_positions.shape[1]
    kept = slot_positions[:, :budget]
    if q_len == 1:
        slots = _least(kept, q_positions, recent_window, seed)
        slots = slots.masked_fill(q_positions < 0, budget)
        slot_positions.scatter_(1, slots, q_positions)
        distance = (q_positions - kept).unsqueeze(1)
        seen = (distance >= 0) & (kept >= 0).unsqueeze(1)
    else:
        entries = torch.cat((kept, q_positions), dim=1)
        queries = torch.cat((q_positions, entries.amax(1, keepdim=True)), dim=1)
        distance, seen = _visible(entries, queries, num_random, recent_window, seed)
        slots = _refilled(seen[:, -1], budget)
        distance, seen = distance[:, :-1].contiguous(), seen[:, :-1]
        slot_positions.scatter_(1, slots, q_positions)
        slot_positions[:, budget].fill_(-1)
    mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -math.inf)
    return slots, distance, mask.unsqueeze(1)
