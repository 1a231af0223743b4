"""A random part of the past without mutation, sorted by TopK: ONNX has no other sort."""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.onnx_functions.state import entries_mask
from rewriter.dialect.random_entries import priorities

__all__ = ["random_entries"]


def random_entries(
    slot_positions: Tensor, q_positions: Tensor, *, num_random: int, recent_window: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rewriter::random_entries` with kv_len = R + W + 1 + q_len, and the positions afterwards."""
    budget = num_random + recent_window
    spare = torch.full_like(slot_positions[:, :1], -1)
    entries = torch.cat((slot_positions[:, :budget], q_positions), dim=1)
    queries = torch.cat((q_positions, entries.amax(1, keepdim=True)), dim=1)
    distance, seen = _visible(entries, queries, num_random, recent_window, seed)
    slots = _refilled(seen[:, -1], budget)
    kept = slot_positions.scatter(1, slots, q_positions)
    distance, hidden = distance[:, :-1], ~seen[:, :-1]
    none = torch.ones_like(hidden[:, :, :1])
    hidden = torch.cat((hidden[:, :, :budget], none, hidden[:, :, budget:]), dim=2)
    far = torch.zeros_like(distance[:, :, :1])
    distance = torch.cat((distance[:, :, :budget], far, distance[:, :, budget:]), dim=2)
    return slots, distance, entries_mask(hidden), torch.cat((kept[:, :budget], spare), dim=1)


def _visible(
    entries: Tensor, queries: Tensor, num_random: int, recent_window: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Distances and whether each query sees each entry, both [batch_size, queries, entries]."""
    distance = queries.unsqueeze(2) - entries.unsqueeze(1)
    real = (entries >= 0).unsqueeze(1)
    older = real & (distance >= recent_window)
    order = torch.topk(priorities(entries, seed), entries.shape[1], dim=1).indices
    order = order.unsqueeze(1).expand(older.shape)
    ranked = older.gather(2, order).to(torch.int64)
    taken = ranked * (ranked.cumsum(2) <= num_random)
    chosen = torch.zeros_like(ranked).scatter(2, order, taken) > 0
    return distance, chosen | (real & (distance >= 0) & (distance < recent_window))


def _refilled(survives: Tensor, budget: int) -> Tensor:
    """Slots of the new entries: those that survive into slots whose entry does not, in order."""
    old, new = survives[:, :budget].to(torch.int64), survives[:, budget:]
    order = old * budget + torch.arange(budget, device=old.device)
    free = torch.topk(order, budget, dim=1, largest=False).indices
    index = (new.to(torch.int64).cumsum(1) - 1).clamp(0, budget - 1)
    return torch.where(new, free.gather(1, index), budget)
