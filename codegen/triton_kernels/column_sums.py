"""How much attention each entry got: column sums of softmax probabilities, from the lse alone.

    out[b, kv_head, n] = Σ over query heads of the group and queries: exp(softcap(q k_nᵀ · scale) - lse)

divided by group_size with `form="mean"`. Layouts: q bhsd [batch_size, num_heads, q_len, head_dim], keys
as in `entries`, any strides, the last dimension contiguous; lse fp32 [batch_size, num_heads, q_len],
contiguous, over the entries that count (as attention gave it); out fp32 [batch_size, num_kv_heads,
capacity]. Query t of request b stands at position q_starts[b] + t; below 0 it is padding.

One program takes a tile of entries of one KV head and keeps its keys while the queries that can see
them pass by, all heads of the group in one tile of rows. So memory is O(kv_len), no atomics are needed
and the sums are the same every time. Sums are fp32. Bytes moved: keys once, queries and lse once per
tile of entries that sees them (from the cache mostly), out once.
Source: https://arxiv.org/abs/2306.14048, by the lse: https://arxiv.org/abs/2205.14135
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# What tl.range and tl.min give has other types inside kernels than outside.
from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernel import KernelDescription
from codegen.triton_kernels.attention_limits import (
    check_cache,
    check_tensors,
    config_key,
    refusal,
    require,
    stride_type,
    tile_width,
    visible_entries,
)
from codegen.triton_kernels.entries import capacity, gathered, index_of, locate
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from codegen.triton_kernels.online_softmax import LOG2_E, capped
from codegen.triton_kernels.product import product
from codegen.triton_kernels.tuned import TunedKernel, config_of_launch
from codegen.triton_kernels.visibility import query_range, sees, structure
from codegen.triton_kernels.whole_softmax import probabilities
from rewriter.cost.cost import Cost
from rewriter.errors import InputError

__all__ = [
    "COLUMN_SUMS",
    "CONFIGS",
    "ColumnSums",
    "ColumnSumsConfig",
    "column_sums",
    "column_sums_cost",
    "column_sums_kernel",
    "column_sums_reference",
    "config_for",
]


@dataclass(frozen=True)
class ColumnSumsConfig:
    """Tile sizes of one program and how the compiler schedules it.

    Attributes:
        block_m: rows (queries times heads of a group) of a tile; block_n: entries of a program.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


CONFIGS = {
    "16-bit 64": ColumnSumsConfig(64, 64, num_warps=8),
    "16-bit 128": ColumnSumsConfig(64, 64, num_warps=8),
    "16-bit 256": ColumnSumsConfig(32, 32),
    **dict.fromkeys(
        ("float32 64", "float32 128", "float32 256"),
        ColumnSumsConfig(16, 16, num_warps=8, num_stages=1),
    ),
}
"""By `config_key`. Taken from what the compiler says, not from timings: large tiles that leave every value
in registers on sm_80, sm_90 and gfx942. fp32 products run outside of tensor cores and keep whole rows of
both tiles in registers."""


def config_for(description: KernelDescription) -> ColumnSumsConfig:
    """The shipped configuration."""
    return CONFIGS[config_key(description)]


@triton.jit
def column_sums_kernel(
    q: tl.tensor,
    k: tl.tensor,
    lse: tl.tensor,
    q_starts: tl.tensor,  # [batch_size]
    index: tl.tensor,  # see `entries`
    kv_lens: tl.tensor,  # [batch_size]: entries in use; of slots the capacity
    out: tl.tensor,
    softmax_scale: tl.tensor,
    batch_size: tl.tensor,
    num_kv_heads: tl.tensor,
    q_len: tl.tensor,
    capacity: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    index_batch: tl.tensor,
    index_head: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MASK: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_SINK_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """BLOCK_N entries of one KV head."""
    request = tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    d = tl.arange(0, BLOCK_D)  # [D]
    live = n < tl.load(kv_lens + request).to(tl.int32)
    place, row, j = locate(
        n, live, index, index_batch, index_head, request, kv_head, LAYOUT, PAGE_SIZE
    )
    holds = j >= 0  # empty slots may hold anything, NaN included
    k += kv_head.to(tl.int64) * k_head
    keys = tl.load(
        k + (place * k_batch + row.to(tl.int64) * k_row)[:, None] + d[None, :],
        mask=holds[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )  # [N, D]

    # Rows are ordered by query, then head, so that those that can see a tile stand together.
    q_start = tl.load(q_starts + request).to(tl.int32)
    first = tl.min(tl.where(holds, j, 2147483647), 0)
    q_end = q_start + q_len
    low, high = query_range(first, tl.max(j, 0), q_end, MASK, SPAN, NUM_SINK_TOKENS)
    start = tl.maximum(tl.minimum(low, q_end) - q_start, 0) * GROUP_SIZE
    stop = (high - q_start) * GROUP_SIZE

    q += request.to(tl.int64) * q_batch
    lse += request.to(tl.int64) * num_kv_heads * GROUP_SIZE * q_len
    sums = tl.zeros([BLOCK_N], tl.float32)
    for first_row in tl.range(start, stop, BLOCK_M):
        r = first_row + tl.arange(0, BLOCK_M)  # [M]
        in_rows = r < stop
        t = (r // GROUP_SIZE).to(tl.int64)
        head = (kv_head * GROUP_SIZE + r % GROUP_SIZE).to(tl.int64)
        queries = tl.load(
            q + (head * q_head + t * q_row)[:, None] + d[None, :],
            mask=in_rows[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )  # [M, D]
        whole = tl.load(lse + head * q_len + t, mask=in_rows, other=float("-inf"))  # [M]
        i = tl.where(whole > float("-inf"), q_start + r // GROUP_SIZE, -1)
        scores = product(queries, tl.trans(keys)) * softmax_scale  # [M, N]
        scores = (capped(scores, SOFTCAP) - whole[:, None]) * LOG2_E
        keep = sees(i[:, None], j[None, :], MASK, SPAN, NUM_SINK_TOKENS)
        # Masked before it is raised, because what is not seen may exceed the lse by far.
        sums += tl.sum(tl.exp2(tl.where(keep, scores, float("-inf"))), 0)

    out += (request * num_kv_heads + kv_head).to(tl.int64) * capacity
    tl.store(out + n, sums / DIVISOR, mask=n < capacity)


class ColumnSums(TunedKernel[ColumnSumsConfig]):
    """`column_sums` as Triton text; `form` is `"sum"` or `"mean"`, over the heads of a group."""

    operator: ClassVar[str] = "column_sums"
    backend: ClassVar[str] = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel.supports`."""
        return refusal(description, forms=("sum", "mean"))

    def config_for(self, description: KernelDescription) -> ColumnSumsConfig:
        """See `TunedKernel`."""
        return config_for(description)

    def candidates(self, description: KernelDescription) -> tuple[ColumnSumsConfig, ...]:
        """See `TunedKernel`."""
        space = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2))
        return tuple(ColumnSumsConfig(*c) for c in space)

    def configured_source(self, description: KernelDescription, config: ColumnSumsConfig) -> str:
        """See `TunedKernel`."""
        require(self, description)
        head_dim = description.head_dim
        strides = [f"{tensor}_{of}" for tensor in "qk" for of in ("batch", "head", "row")]
        return generate(
            column_sums_kernel,
            description=description,
            source_url="https://arxiv.org/abs/2306.14048",
            signature={
                **dict.fromkeys("qk", pointer(description.dtype)),
                "lse": pointer(torch.float32),
                **dict.fromkeys(("q_starts", "index", "kv_lens"), pointer(torch.int64)),
                "out": pointer(torch.float32),
                "softmax_scale": "fp32",
                **dict.fromkeys(("batch_size", "num_kv_heads", "q_len", "capacity"), "i32"),
                **dict.fromkeys(strides, stride_type(head_dim)),
                **dict.fromkeys(("index_batch", "index_head"), "i64"),
            },
            constants={
                "GROUP_SIZE": description.group_size,
                "HEAD_DIM": head_dim,
                "LAYOUT": description.layout,
                "PAGE_SIZE": description.page_size,
                "MASK": description.mask,
                "SPAN": description.span,
                "NUM_SINK_TOKENS": description.num_sink_tokens,
                "SOFTCAP": description.softcap,
                "DIVISOR": _divisor(description),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_D": tile_width(head_dim),
            },
            launch=Launch(
                ("batch_size * num_kv_heads", "cdiv(capacity, BLOCK_N)"),
                config.num_warps,
                config.num_stages,
            ),
        )


COLUMN_SUMS = ColumnSums()


def _divisor(description: KernelDescription) -> float:
    return float(description.group_size if description.form == "mean" else 1)


def column_sums(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    q_starts: Tensor | None = None,
    kv_lens: Tensor | None = None,
    k_positions: Tensor | None = None,
    block_table: Tensor | None = None,
    config: ColumnSumsConfig | None = None,
) -> Tensor:
    """Attention that each entry got from q.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim].
        k: keys in the described layout (see `entries`).
        lse: fp32 [batch_size, num_heads, q_len]; a row of -inf gives nothing to anybody.
        q_starts: int64 [batch_size], position of query 0; None = the last q_len of the capacity.
        kv_lens: int64 [batch_size], entries in use; None = the capacity.
        k_positions: of `slots`; block_table: of `paged`.
        config: None = by the rule of `codegen.tuning`.

    Returns:
        fp32 [batch_size, num_kv_heads, capacity], 0 where there is no entry.

    Raises:
        InputError: tensors that are not as described.
    """
    check_tensors(description, q=q, k=k)
    (batch_size, num_heads, q_len, _), num_kv_heads = q.shape, k.shape[1]
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32 or not lse.is_contiguous():
        told = f"lse: {lse.dtype} {tuple(lse.shape)}"
        raise InputError(f"{told}, allowed: contiguous float32 {(batch_size, num_heads, q_len)}")
    entries = capacity(description.layout, k, block_table)
    if q_starts is None:
        q_starts = torch.full((batch_size,), entries - q_len, device=q.device)
    if kv_lens is None:
        kv_lens = torch.full((batch_size,), entries, device=q.device)
    index = index_of(description.layout, kv_lens, k_positions, block_table)
    check_cache(description, q, k, None, index[0], q_starts=q_starts, kv_lens=kv_lens)
    out = lse.new_empty((batch_size, num_kv_heads, entries))
    sizes = (batch_size, num_kv_heads, q_len, entries)
    strides = (*q.stride()[:3], *k.stride()[:3], *index[1:])
    arguments = (q, k, lse, q_starts, index[0], kv_lens, out, softmax_scale, *sizes, *strides)

    def launch(config: ColumnSumsConfig) -> None:
        grid = (batch_size * num_kv_heads, triton.cdiv(entries, config.block_n))
        run(COLUMN_SUMS, description, grid, arguments, config)

    def asked() -> dict[str, int]:
        return {
            "batch_size": batch_size,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "q_len": q_len,
            "kv_len": entries,
            "entries": visible_entries(description, entries),
        }

    launch(config or config_of_launch(COLUMN_SUMS, description, q.device, asked, launch))
    return out


def column_sums_reference(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    *,
    softmax_scale: float,
    q_starts: Tensor,
    index: Tensor,
    kv_lens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch from whole rows of probabilities; also their lse."""
    d = description
    k, positions = gathered(d.layout, k, index, kv_lens)
    i = q_starts.view(-1, 1, 1) + torch.arange(q.shape[2], device=q.device)
    keep = structure(i, positions, d.mask, d.span, d.num_sink_tokens)
    weights, lse = probabilities(d, q, k, keep, softmax_scale)
    return weights.sum(2).unflatten(1, (k.shape[1], -1)).sum(2) / _divisor(d), lse


def column_sums_cost(
    description: KernelDescription, batch_size: int, num_heads: int, q_len: int, kv_len: int
) -> Cost:
    """One product over visible entries (half of them in a causal square); everything read once."""
    entries = float(visible_entries(description, kv_len))
    if description.mask in ("causal", "prefix"):
        entries -= (q_len - 1) / 2
    rows = batch_size * num_heads * q_len
    cached = batch_size * num_heads // description.group_size * kv_len
    moved = (cached + rows) * description.head_dim * description.dtype.itemsize
    return Cost(2.0 * rows * entries * description.head_dim, moved + 4.0 * (rows + cached), 1)
