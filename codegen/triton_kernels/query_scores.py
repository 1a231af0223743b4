"""Scores of one query a request against cached keys, and their log-sum-exp.

    s[h, n] = softcap(q_h k_n · softmax_scale) for candidates n;  lse[h] = log Σ_n exp(s[h, n])

Candidates stand at positions starts[b] <= position < stops[b]; other entries that are visited get -inf.
Both results are in powers of two (times log2 e), for `page_scores`, which reads them.

Layouts: q [batch_size, num_heads, head_dim]; keys as in `entries`, any strides, the last dimension
contiguous; scores fp32 [batch_size, num_heads, capacity] and lse fp32 [batch_size, num_heads, num_splits],
contiguous. Of layouts other than `slots` only the scores of candidates are written. One program takes
one split of the entries of one KV head, all heads of the group being rows of one tile. Accumulation is
fp32. Bytes moved: keys of candidates once, their scores once.
Source: https://arxiv.org/abs/2411.02886
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# What tl.range and tl.max give has other types inside kernels than outside.
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels.attention_limits import (
    config_key,
    refusal,
    require,
    stride_type,
    tile_width,
)
from codegen.triton_kernels.entries import locate
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from codegen.triton_kernels.online_softmax import LOG2_E, capped, fold_in
from codegen.triton_kernels.product import product
from rewriter.cost.cost import Cost

__all__ = [
    "CONFIGS",
    "MAX_SPLITS",
    "QUERY_SCORES",
    "QueryScores",
    "QueryScoresConfig",
    "choose_splits",
    "config_for",
    "query_scores",
    "query_scores_cost",
    "query_scores_kernel",
]

MAX_SPLITS = 64
"""Every reader of the scores merges all splits of an lse, so there are not too many."""


@dataclass(frozen=True)
class QueryScoresConfig:
    """Entries of a tile and how the compiler schedules it."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 2


CONFIGS = {
    "16-bit 64": QueryScoresConfig(64),
    "16-bit 128": QueryScoresConfig(64),
    "16-bit 256": QueryScoresConfig(32),
    **dict.fromkeys(
        ("float32 64", "float32 128", "float32 256"),
        QueryScoresConfig(16, num_warps=8, num_stages=1),
    ),
}
"""By `config_key`. Taken from what the compiler says, not from timings: large tiles that leave every value
in registers on sm_80, sm_90 and gfx942."""


def config_for(description: KernelDescription) -> QueryScoresConfig:
    """The shipped configuration."""
    return CONFIGS[config_key(description)]


@triton.jit
def query_scores_kernel(
    q: tl.tensor,
    k: tl.tensor,
    starts: tl.tensor,  # [batch_size]
    stops: tl.tensor,  # [batch_size]
    index: tl.tensor,  # see `entries`
    scores: tl.tensor,  # [batch_size, num_heads, capacity]
    lses: tl.tensor,  # [batch_size, num_heads, num_splits]
    softmax_scale: tl.tensor,
    batch_size: tl.tensor,
    num_kv_heads: tl.tensor,
    capacity: tl.tensor,
    num_splits: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    index_batch: tl.tensor,
    index_head: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """The heads of one KV head's group, one split of the entries."""
    request = tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    g = tl.arange(0, BLOCK_M)  # [M]
    d = tl.arange(0, BLOCK_D)  # [D]
    in_rows = g < GROUP_SIZE
    head = (kv_head * GROUP_SIZE + g).to(tl.int64)
    queries = tl.load(
        q + request.to(tl.int64) * q_batch + (head * q_head)[:, None] + d[None, :],
        mask=in_rows[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )  # [M, D]

    first_position = tl.load(starts + request).to(tl.int32)
    end_position = tl.load(stops + request).to(tl.int32)
    low = first_position
    high = end_position
    if LAYOUT == "slots":
        low = first_position * 0
        high = low + capacity
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), num_splits), BLOCK_N) * BLOCK_N
    start = low + split * share
    stop = tl.minimum(start + share, high)

    k += kv_head.to(tl.int64) * k_head
    rows = request.to(tl.int64) * num_kv_heads * GROUP_SIZE + head  # [M]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)  # [N]
        live = n < stop
        place, row, j = locate(
            n, live, index, index_batch, index_head, request, kv_head, LAYOUT, PAGE_SIZE
        )
        votes = (j >= first_position) & (j < end_position) & (j >= 0)
        keys = tl.load(
            k + (place * k_batch + row.to(tl.int64) * k_row)[:, None] + d[None, :],
            mask=votes[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )  # [N, D]
        found = product(queries, tl.trans(keys)) * softmax_scale  # [M, N]
        found = capped(found, SOFTCAP) * LOG2_E
        found = tl.where(votes[None, :], found, float("-inf"))
        tl.store(
            scores + rows[:, None] * capacity + n[None, :],
            found,
            mask=in_rows[:, None] & live[None, :],
        )
        _, _, peak, total = fold_in(found, peak, total)
    seen = total > 0.0
    lse = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    tl.store(lses + rows * num_splits + split, lse, mask=in_rows)


class QueryScores(Kernel):
    """`query_scores` as Triton text."""

    operator: ClassVar[str] = "query_scores"
    backend: ClassVar[str] = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel.supports`. `mask` is `"full"`: candidates are arguments."""
        return refusal(description, masks=("full",), forms=("max", "sum"))

    def source(self, description: KernelDescription) -> str:
        """See `Kernel.source`."""
        require(self, description)
        config, head_dim = config_for(description), description.head_dim
        strides = ("q_batch", "q_head", "k_batch", "k_head", "k_row")
        return generate(
            query_scores_kernel,
            description=description,
            source_url="https://arxiv.org/abs/2411.02886",
            signature={
                **dict.fromkeys("qk", pointer(description.dtype)),
                **dict.fromkeys(("starts", "stops", "index"), pointer(torch.int64)),
                **dict.fromkeys(("scores", "lses"), pointer(torch.float32)),
                "softmax_scale": "fp32",
                **dict.fromkeys(("batch_size", "num_kv_heads", "capacity", "num_splits"), "i32"),
                **dict.fromkeys(strides, stride_type(head_dim)),
                **dict.fromkeys(("index_batch", "index_head"), "i64"),
            },
            constants={
                "GROUP_SIZE": description.group_size,
                "HEAD_DIM": head_dim,
                "LAYOUT": description.layout,
                "PAGE_SIZE": description.page_size,
                "SOFTCAP": description.softcap,
                "BLOCK_M": tile_width(description.group_size),
                "BLOCK_N": config.block_n,
                "BLOCK_D": tile_width(head_dim),
            },
            launch=Launch(
                ("batch_size * num_kv_heads", "num_splits"), config.num_warps, config.num_stages
            ),
        )


QUERY_SCORES = QueryScores()


def choose_splits(description: KernelDescription, programs: int, kv_len: int, q: Tensor) -> int:
    """Splits of at least four tiles, as many as it takes to give every multiprocessor two programs.

    Args:
        programs: of one split; kv_len: the most entries of a request; q: on the device that counts.
    """
    if not q.is_cuda:
        return 1
    wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count
    tiles = triton.cdiv(kv_len, config_for(description).block_n)
    return max(1, min(triton.cdiv(wanted, max(programs, 1)), tiles // 4, MAX_SPLITS))


def query_scores(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    stops: Tensor,
    index: tuple[Tensor, int, int],
    entries: int,
    *,
    softmax_scale: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """Scores and their lse, see the module; `page_scores` checks the arguments, which are its own.

    Args:
        index: from `index_of`; entries: the capacity.
    """
    (batch_size, num_heads, _), num_kv_heads = q.shape, k.shape[1]
    scores = q.new_empty((batch_size, num_heads, entries), dtype=torch.float32)
    lses = scores.new_empty((batch_size, num_heads, num_splits))
    strides = (*q.stride()[:2], *k.stride()[:3], *index[1:])
    sizes = (batch_size, num_kv_heads, entries, num_splits)
    tensors = (q, k, starts, stops, index[0], scores, lses)
    grid = (batch_size * num_kv_heads, num_splits)
    run(QUERY_SCORES, description, grid, (*tensors, softmax_scale, *sizes, *strides))
    return scores, lses


def query_scores_cost(
    description: KernelDescription, batch_size: int, num_heads: int, kv_len: int
) -> Cost:
    """One product over the candidates, keys read once, scores written once."""
    pairs = batch_size * num_heads * kv_len
    keys = pairs / description.group_size * description.head_dim * description.dtype.itemsize
    return Cost(2.0 * pairs * description.head_dim, keys + 4.0 * pairs, 1)
