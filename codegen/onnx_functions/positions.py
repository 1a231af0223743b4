"""Where tokens stand, from what the caller of a file says: a mask, or true positions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "by_mask",
    "by_position",
    "last_row",
    "right_padded",
    "rows_by_mask",
    "rows_right_padded",
]

Positions = tuple[Tensor, Tensor, Tensor]
"""`position_ids` and `q_positions` int64 [batch_size, q_len], `k_positions` [batch_size, kv_len]."""


def by_mask(attention_mask: Tensor, input_ids: Tensor) -> Positions:
    """Positions count the ones of the mask [batch_size, total_len], wherever padding stands."""
    counted = attention_mask.cumsum(1) - 1
    k_positions = torch.where(attention_mask != 0, counted, -1)
    q_positions = k_positions[:, attention_mask.shape[1] - input_ids.shape[1] :]
    return q_positions.clamp_min(0), q_positions, k_positions


def right_padded(attention_mask: Tensor, input_ids: Tensor) -> Positions:
    """Positions where every row's tokens are its first entries, as GroupQueryAttention keeps them.

    The first call counts from 0, padding behind the tokens included. Later ones bring as many tokens
    for every row, which end at the number of ones in its mask.
    """
    total, q_len = attention_mask.shape[1], input_ids.shape[1]
    columns = torch.arange(q_len, device=input_ids.device)
    later = (attention_mask.sum(1, keepdim=True) - q_len).clamp_min(0)
    past = torch.full((1, 1), total - q_len, dtype=torch.int64, device=input_ids.device)
    positions = torch.where(past > 0, later, 0) + columns
    return positions, positions, torch.arange(total, device=input_ids.device).unsqueeze(0)


def by_position(true_positions: Tensor) -> Tensor:
    """`position_ids`: true positions [batch_size, q_len] with padding, -1, at 0."""
    return true_positions.clamp_min(0)


def rows_by_mask(q_positions: Tensor) -> Tensor:
    """The last column with a token, int64 [batch_size]."""
    columns = torch.arange(q_positions.shape[1], device=q_positions.device)
    return torch.where(q_positions >= 0, columns, 0).amax(1)


def rows_right_padded(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """The same where tokens come first."""
    return (attention_mask.sum(1) - 1).clamp_max(input_ids.shape[1] - 1).clamp_min(0)


def last_row(hidden: Tensor, columns: Tensor) -> Tensor:
    """hidden[b, columns[b]] of [batch_size, q_len, width], as [batch_size, 1, width]."""
    index = columns.view(-1, 1, 1).expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, index)
