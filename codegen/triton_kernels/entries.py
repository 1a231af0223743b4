"""Where cached entries lie and at which positions they stand, for each layout of a cache.

- `bhsd`: keys and values [batch_size, num_kv_heads, capacity, d]; entry n stands at position n.
- `slots`: the same with entries in any order; `index` [batch_size, 1 or num_kv_heads, capacity] holds
  the position of each, -1 = empty.
- `paged`: keys and values [num_pages, num_kv_heads, page_size, d]; the entry at position n is in page
  `index[b, n // page_size]`, `index` being the block table [batch_size, pages of a request].

Strides are free but for the last dimension, which is contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewriter.errors import InputError

__all__ = ["LAYOUTS", "capacity", "gathered", "index_of", "locate"]

LAYOUTS = ("bhsd", "slots", "paged")


@triton.jit
def locate(
    n: tl.tensor,
    live: tl.tensor,
    index: tl.tensor,
    index_batch: tl.tensor,
    index_head: tl.tensor,
    request: tl.tensor,
    kv_head: tl.tensor,
    LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """First coordinate in storage, row there and position of the entries n [N] that are live [N].

    The first coordinate is int64: the request itself, or the page [N]. Positions [N] are -1 where
    there is no entry.
    """
    index += request.to(tl.int64) * index_batch + kv_head.to(tl.int64) * index_head
    if LAYOUT == "paged":
        first = tl.load(index + n // PAGE_SIZE, mask=live, other=0).to(tl.int64)
        row = n % PAGE_SIZE
        position = tl.where(live, n, -1)
    elif LAYOUT == "slots":
        first = request.to(tl.int64)
        row = n
        position = tl.load(index + n, mask=live, other=-1).to(tl.int32)
    else:
        first = request.to(tl.int64)
        row = n
        position = tl.where(live, n, -1)
    return first, row, position


def index_of(
    layout: str, unread: Tensor, k_positions: Tensor | None, block_table: Tensor | None
) -> tuple[Tensor, int, int]:
    """The tensor a kernel calls `index`, with its strides of batch and head.

    Args:
        unread: integers that stand in where a layout reads no index.
        k_positions: [batch_size, capacity] or [batch_size, 1 or num_kv_heads, capacity], for `slots`.
        block_table: [batch_size, pages], for `paged`.

    Raises:
        InputError: the tensor that the layout needs is missing or its last dimension is strided.
    """
    if layout == "bhsd":
        return unread, 0, 0
    index = k_positions if layout == "slots" else block_table
    if index is None:
        needed = "k_positions" if layout == "slots" else "block_table"
        raise InputError(f"layout={layout!r} needs {needed}")
    if index.stride(-1) != 1:
        raise InputError(f"index of layout={layout!r} has stride {index.stride(-1)}, allowed: 1")
    of_each_head = index.dim() == 3 and index.shape[1] > 1
    return index, index.stride(0), index.stride(1) if of_each_head else 0


def capacity(layout: str, k: Tensor, block_table: Tensor | None) -> int:
    """The most entries that a request can have, from shapes alone."""
    if layout == "paged" and block_table is not None:
        return block_table.shape[1] * k.shape[2]
    return k.shape[2]


def gathered(layout: str, cache: Tensor, index: Tensor, kv_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of each request in plain PyTorch, zeros where there are none.

    Returns:
        keys or values bhsd [batch_size, num_kv_heads, capacity, d] and positions int64
        [batch_size, 1 or num_kv_heads, capacity], -1 = empty.
    """
    if layout == "paged":
        pages = cache[index.long()]  # [batch_size, pages, num_kv_heads, page_size, d]
        cache = pages.transpose(1, 2).flatten(2, 3)
    n = torch.arange(cache.shape[2], device=cache.device)
    positions = n.expand(kv_lens.shape[0], 1, -1)
    if layout == "slots":
        positions = index if index.dim() == 3 else index.unsqueeze(1)
    positions = positions.masked_fill(n >= kv_lens.view(-1, 1, 1), -1)
    return cache.masked_fill((positions < 0).unsqueeze(-1), 0.0), positions
