"""What a session is fed: checked, and every token given its true position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.errors import InputError

__all__ = ["check_tokens", "new_columns", "new_positions"]

INTEGERS = (torch.int64, torch.int32)
FEW = 16
"""Tokens that are listed to look at them."""


def check_tokens(input_ids: Any, batch_size: int | None, vocab_size: int | None) -> None:
    """Raises InputError unless they are int [batch_size, 1 or more], each from the vocabulary.

    The range is looked at on the CPU only: elsewhere it would wait for the device at every token.
    """
    if not isinstance(input_ids, Tensor):
        raise InputError(f"input_ids is {type(input_ids).__name__}; allowed: an integer tensor")
    if input_ids.dtype not in INTEGERS:
        raise InputError(
            f"input_ids has dtype {input_ids.dtype}; allowed: torch.int64, torch.int32"
        )
    rows = "batch_size" if batch_size is None else batch_size
    shape = list(input_ids.shape)
    if len(shape) != 2 or 0 in shape or (batch_size is not None and shape[0] != batch_size):
        raise InputError(f"input_ids has shape {shape}; allowed: [{rows}, 1 or more]")
    if vocab_size is None or input_ids.device.type != "cpu":
        return
    lowest, highest = _bounds(input_ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"input_ids has the token {wrong}; allowed: 0 to {vocab_size - 1}")


def _bounds(ids: Tensor) -> tuple[int, int]:
    """The least and the largest; of a decode step with one operator, as every one of them counts there."""
    if ids.numel() <= FEW:
        listed = [token for row in ids.tolist() for token in row]
        return min(listed), max(listed)
    lowest, highest = ids.aminmax()
    return int(lowest), int(highest)


def new_columns(attention_mask: Any, batch_size: int, q_len: int) -> Tensor | None:
    """The last q_len columns as bool [batch_size, q_len]; None when nothing in them is padding.

    Raises:
        InputError: not a tensor [batch_size, q_len or more].
    """
    if not isinstance(attention_mask, Tensor):
        raise InputError(f"attention_mask is {type(attention_mask).__name__}; allowed: a tensor")
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
        shape = list(attention_mask.shape)
        raise InputError(f"attention_mask has shape {shape}; allowed: [{batch_size}, tokens]")
    if attention_mask.shape[1] < q_len:
        columns = attention_mask.shape[1]
        raise InputError(f"attention_mask has {columns} columns; allowed: {q_len} or more")
    real = attention_mask[:, -q_len:].to(torch.bool)
    return None if bool(real.all()) else real


def new_positions(
    start: Tensor, q_len: int, real: Tensor | None, given: Tensor | None, *, dense: bool
) -> Tensor:
    """True positions of new tokens, int64 [batch_size, q_len], -1 = padding.

    Args:
        start: position of each row's next token, int64 [batch_size].
        real: bool [batch_size, q_len], False = padding, which takes no position; None = all real.
        given: positions asked for. A row counts on by one from any position, or by one over padding
            too, as models do that number columns.
        dense: whether every entry is kept; otherwise positions have to go on from `start` by one.

    Raises:
        InputError: positions that do neither.
    """
    columns = torch.arange(q_len, device=start.device).expand(start.shape[0], -1)
    steps = columns if real is None else real.cumsum(1) - 1
    counted = start.unsqueeze(1) + steps
    if given is None:
        return counted if real is None else counted.masked_fill(~real, -1)
    given = _checked(given, *counted.shape).to(start.device)
    shown = torch.ones_like(counted, dtype=torch.bool) if real is None else real
    if bool((given[shown] < 0).any()):
        raise InputError(f"position_ids has {int(given[shown].min())}; allowed: 0 or more")
    if not dense and not torch.equal(given[shown], counted[shown]):
        raise InputError("position_ids have to count on by one: this program keeps bounded state")
    if not any(_constant(given - count, shown) for count in (counted, columns)):
        raise InputError("position_ids have to ascend by one along each row")
    return given.masked_fill(~shown, -1)


def _checked(given: Tensor, rows: int, q_len: int) -> Tensor:
    if given.dtype not in INTEGERS:
        raise InputError(f"position_ids has dtype {given.dtype}; allowed: torch.int64, torch.int32")
    if given.dim() != 2 or given.shape[0] not in (1, rows) or given.shape[1] != q_len:
        shape = list(given.shape)
        raise InputError(f"position_ids has shape {shape}; allowed: [{rows} or 1, {q_len}]")
    return given.to(torch.int64).expand(rows, -1)


def _constant(values: Tensor, shown: Tensor) -> bool:
    """Whether each row has one value where `shown`."""
    bounds = torch.iinfo(values.dtype)
    low = torch.where(shown, values, bounds.max).amin(1)
    high = torch.where(shown, values, bounds.min).amax(1)
    return bool((low >= high).all())
