"""Attention of many queries on a CPU: PyTorch's fused kernel on what is visible, and nothing else.

    out = softmax(q kᵀ · softmax_scale, masked) v,   lse = log Σ exp(the same scores)

There is no C++ of our own here. Queries are taken in tiles. Entries that every query of a tile sees go
through the fused kernel without a mask; those that only some see, at the edges of a window or on the
diagonal, with the mask of that tile; entries that none sees are not touched. The two are joined by their
log-sum-exps. Layout: bhsd, grouped heads not repeated. Accumulation: the fused kernel's, fp32.

Milliseconds of one core of a Xeon (torch 2.13, 8 heads on 2, head_dim 64, tile 128) against the fused
kernel with the mask as a tensor:

| queries | mask | fp32 | with a tensor | bf16 | with a tensor |
|---|---|---|---|---|---|
| 2048 | window of 512 | 37 | 78 | 28 | 28 |
| 4096 | window of 256 | 55 | 309 | 33 | 114 |
| 4096 | window of 1024 | 108 | 306 | 68 | 128 |
| 4096 | 4 sinks, window of 1024 | 118 | 312 | 69 | 124 |

The fused kernel's two traps: a row that sees nothing gets an lse of 0 instead of -inf, and a mask has to be
of the queries' dtype. Sources: https://arxiv.org/abs/2205.14135; sinks: https://arxiv.org/abs/2309.17453;
tiles: https://arxiv.org/abs/2407.02490
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from codegen.cpp_kernels.attention_inputs import AttentionInputs, refuse, unsupported, value_width
from codegen.kernel import KernelDescription
from rewriter.cost.cost import Cost
from rewriter.dialect.attention import visible
from rewriter.errors import ConfigError

__all__ = ["cost", "prefill_attention", "supports"]

Ranges = list[tuple[int, int]]


def supports(description: KernelDescription) -> str | None:
    """Why the fused kernel cannot do what is described; None where it can."""
    d = description
    if d.layout != "bhsd":
        return f"layout={d.layout!r}: bhsd"
    if d.softcap:
        return f"softcap={d.softcap}: 0"
    if value_width(d) != d.head_dim:
        return f"value_dim={d.value_dim}: that of keys, {d.head_dim}"
    if d.weight_dtype not in (None, d.dtype):
        return f"weight_dtype={d.weight_dtype}: that of queries"
    return unsupported(d)


def prefill_attention(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    block_mask: Tensor | None = None,
    tile: int = 128,
) -> tuple[Tensor, Tensor]:
    """Attention of the last q_len of kv_len entries, with the description's mask.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim]; k, v: bhsd [batch_size, num_kv_heads, kv_len,
            head_dim], all of the description's dtype.
        block_mask: bool [1 or num_heads, q_len / tile, kv_len / tile], rounded up, True = compute;
            on top of the mask.
        tile: queries of a tile, and the side of block_mask's tiles.

    Returns:
        out like q, and lse fp32 [batch_size, num_heads, q_len]. Rows that see nothing are zero, with
        an lse of -inf.

    Raises:
        ConfigError: see `supports`. InputError: a tensor of another shape, dtype or device.
    """
    d, refusal = description, supports(description)
    if refusal is not None:
        raise ConfigError("description", str(description), refusal)
    AttentionInputs(d, q, k, v, None, None)
    q_len, kv_len = q.shape[2], k.shape[2]
    if (
        block_mask is None
        and d.mask in ("full", "causal")
        and (d.mask == "full" or q_len == kv_len)
    ):
        return _fused(q, k, v, softmax_scale, causal=d.mask == "causal" and q_len > 1)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for heads, blocks in _by_head(block_mask, q, kv_len, tile):
        kv_heads = _kv_heads(heads, q.shape[1], k.shape[1])
        for first in range(0, q_len, tile):
            rows = slice(first, min(first + tile, q_len))
            columns = None if blocks is None else blocks[first // tile].repeat_interleave(tile)
            mine = q[:, heads, rows], k[:, kv_heads], v[:, kv_heads]
            part, part_lse = _attend_tile(d, *mine, first, q_len, columns, softmax_scale)
            out[:, heads, rows], lse[:, heads, rows] = part, part_lse
    return out, lse


def cost(
    description: KernelDescription, q: Tensor, k: Tensor, v: Tensor, *, tile: int = 128
) -> Cost:
    """Both products over the entries that tiles touch; q, k, v and the output once."""
    q_len, kv_len = q.shape[2], k.shape[2]
    pairs = 0
    for first in range(0, q_len, tile):
        last = min(first + tile, q_len)
        whole, edge = _columns(description, first + kv_len - q_len, last - first, kv_len, None)
        pairs += (last - first) * int(whole.sum() + edge.sum())
    flops = 4.0 * q.shape[0] * q.shape[1] * pairs * q.shape[3]
    moved = sum(t.numel() * t.element_size() for t in (q, k, v, q))
    return Cost(flops, float(moved), 2 * -(-q_len // tile))


def _by_head(
    block_mask: Tensor | None, q: Tensor, kv_len: int, tile: int
) -> Iterator[tuple[slice, Tensor | None]]:
    """Heads that see the same tiles, with those."""
    if block_mask is None:
        yield slice(0, q.shape[1]), None
        return
    wanted = (-(-q.shape[2] // tile), -(-kv_len // tile))
    good = block_mask.dim() == 3 and block_mask.shape[0] in (1, q.shape[1])
    if not good or block_mask.shape[1:] != wanted or block_mask.dtype != torch.bool:
        refuse("block_mask", block_mask, f"bool [1 or {q.shape[1]}, {wanted[0]}, {wanted[1]}]")
    if block_mask.shape[0] == 1:
        yield slice(0, q.shape[1]), block_mask[0]
        return
    for head, blocks in enumerate(block_mask):
        yield slice(head, head + 1), blocks


def _kv_heads(heads: slice, num_heads: int, num_kv_heads: int) -> slice:
    if heads.stop - heads.start == num_heads:
        return slice(0, num_kv_heads)
    head = heads.start // (num_heads // num_kv_heads)
    return slice(head, head + 1)


def _columns(
    d: KernelDescription, first: int, count: int, kv_len: int, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """bool [kv_len] each: entries that all of `count` queries from position `first` see, and some."""
    entries = torch.arange(kv_len)
    ends = _keep(d, torch.tensor([first, first + count - 1]), entries)
    whole = ends.all(0)
    # Between two queries windows only move on: what lies between the ends is all that may be missing.
    inner = (entries >= first) & (entries < first + count)
    edge = (ends.any(0) | inner) & ~whole
    if d.mask == "full" or (count > max(d.span, 1) and d.mask not in ("causal", "prefix")):
        whole, edge = _exact(d, first, count, entries)
    if allowed is not None:
        whole, edge = whole & allowed[:kv_len], edge & allowed[:kv_len]
    return whole, edge


def _exact(d: KernelDescription, first: int, count: int, entries: Tensor) -> tuple[Tensor, Tensor]:
    """The same by looking at every pair."""
    keep = _keep(d, first + torch.arange(count), entries)
    whole = keep.all(0)
    return whole, keep.any(0) & ~whole


def _keep(d: KernelDescription, queries: Tensor, entries: Tensor) -> Tensor:
    if d.mask != "sinks_window":
        return visible(queries, entries, d.mask, d.span)
    window = visible(queries, entries, "sliding_window", d.span)
    return window | visible(queries, entries, "causal", 0) & (entries < d.num_sink_tokens)


def _attend_tile(
    d: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    q_len: int,
    allowed: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Of the queries from row `first` on."""
    kv_len, count = k.shape[2], q.shape[2]
    position = first + kv_len - q_len
    whole, edge = _columns(d, position, count, kv_len, allowed)
    if not whole.any() and not edge.any():
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    parts = []
    if whole.sum() < edge.sum():  # one call with a mask is cheaper than two and a merge
        whole, edge = torch.zeros_like(whole), whole | edge
    if whole.any():
        parts.append(_fused(q, _take(k, whole), _take(v, whole), softmax_scale))
    if edge.any():
        keep = _keep(d, position + torch.arange(count), edge.nonzero().squeeze(1))
        parts.append(_fused(q, _take(k, edge), _take(v, edge), softmax_scale, keep=keep))
    if len(parts) == 1:
        return parts[0]
    (out, lse), (more, more_lse) = parts
    share = torch.sigmoid(more_lse - lse).unsqueeze(-1)
    return torch.lerp(out.float(), more.float(), share).to(q.dtype), torch.logaddexp(lse, more_lse)


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """Entries where `columns` is true: a view where they are adjacent."""
    at = columns.nonzero().squeeze(1)
    start, stop = int(at[0]), int(at[-1]) + 1
    return x[:, :, start:stop] if stop - start == at.numel() else x.index_select(2, at)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    *,
    causal: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's kernel, its lse put right; keep bool [q_len, kv_len]."""
    mask = None
    if keep is not None:
        mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill_(~keep, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=softmax_scale
    )
    if keep is not None:
        lse = lse.masked_fill(~keep.any(-1), -torch.inf)
    return out, lse
