"""How much each page of a cache matters to a decoded token: scores, a vote of the heads, pages.

    s[h, n] = softcap(q_h k_n · softmax_scale);  p[h, n] = softmax over candidates n of s[h, n]
    vote[n] = Σ_h p[h, n];  page = max, or sum, of vote over its entries

Candidates stand at positions starts[b] <= position < stops[b]. The heads that vote together are all of
them, or those of one KV head. Pages are `page_size` consecutive entries of a request; the top ones are
then chosen by `top_pages`. Layouts: q [batch_size, num_heads, head_dim]; keys as in `entries`, any
strides, the last dimension contiguous. Scores fp32 [batch_size, num_heads, capacity] in powers of two and
their log-sum-exp [batch_size, num_heads, num_splits] are kept between two kernels, because they are
smaller than the keys by far (num_heads · 4 bytes of an entry against num_kv_heads · head_dim · 2).

`query_scores`: one program takes one split of the entries of one KV head, all heads of the group being
rows of one tile. `page_scores`: one program takes a few pages, head after head. Accumulation is fp32.
Bytes moved: keys of candidates once, scores written and read once, pages written.
Source: https://arxiv.org/abs/2411.02886 (soft vote over entries), https://arxiv.org/abs/2406.10774 (pages)
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# What tl.range, tl.min and tl.max give has other types inside kernels than outside.
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels.attention_limits import (
    check_cache,
    check_tensors,
    refusal,
    require,
    stride_type,
    tile_width,
)
from codegen.triton_kernels.entries import capacity, gathered, index_of, locate
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from codegen.triton_kernels.online_softmax import LOG2_E, capped, fold_in
from codegen.triton_kernels.product import product
from rewriter.cost.cost import Cost
from rewriter.dialect.attention import repeat_kv
from rewriter.errors import InputError

__all__ = [
    "CONFIGS",
    "MAX_PAGE_SIZE",
    "PAGE_SCORES",
    "QUERY_SCORES",
    "VOTE_CONFIG",
    "PageScores",
    "QueryScores",
    "QueryScoresConfig",
    "VoteConfig",
    "config_for",
    "page_scores",
    "page_scores_cost",
    "page_scores_kernel",
    "page_scores_reference",
    "query_scores_kernel",
    "top_pages",
]

MAX_PAGE_SIZE = 1024


@dataclass(frozen=True)
class QueryScoresConfig:
    """Entries of a tile and how the compiler schedules it."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class VoteConfig:
    """Entries that one program lets the heads vote on, in whole pages."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 2


CONFIGS = {
    "16-bit": QueryScoresConfig(64),
    "16-bit wide": QueryScoresConfig(32),
    "float32": QueryScoresConfig(16, num_warps=8, num_stages=1),
}
"""By dtype and whether heads are wider than 128. Taken from what the compiler says, not from timings:
large tiles that leave every value in registers on sm_80, sm_90 and gfx942."""

VOTE_CONFIG = VoteConfig(256)
"""Two entries for each of 128 threads. Not from timings."""


def config_for(description: KernelDescription) -> QueryScoresConfig:
    """The shipped configuration of `query_scores`."""
    if description.dtype == torch.float32:
        return CONFIGS["float32"]
    return CONFIGS["16-bit wide" if description.head_dim > 128 else "16-bit"]


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


@triton.jit
def page_scores_kernel(
    scores: tl.tensor,  # [batch_size, num_heads, capacity]
    lses: tl.tensor,  # [batch_size, num_heads, num_splits]
    starts: tl.tensor,  # [batch_size]
    stops: tl.tensor,  # [batch_size]
    out: tl.tensor,  # [batch_size, num_ballots, num_pages]
    batch_size: tl.tensor,
    num_ballots: tl.tensor,
    num_voters: tl.tensor,  # heads of a ballot
    capacity: tl.tensor,
    num_splits: tl.tensor,
    num_pages: tl.tensor,
    LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """BLOCK_P pages, one ballot of one request."""
    ballot = tl.program_id(0).to(tl.int64)  # of all requests
    page = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    entry = tl.arange(0, BLOCK_E)  # [E]
    n = page[:, None] * PAGE_SIZE + entry[None, :]  # [P, E]
    low = 0
    high = capacity
    if LAYOUT != "slots":
        low = tl.load(starts + ballot // num_ballots).to(tl.int32)
        high = tl.load(stops + ballot // num_ballots).to(tl.int32)
    scored = (entry < PAGE_SIZE)[None, :] & (n >= low) & (n < high)
    split = tl.arange(0, BLOCK_S)  # [S]
    vote = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    known = tl.zeros([BLOCK_P, BLOCK_E], tl.int1)
    for voter in tl.range(0, num_voters):
        row = ballot * num_voters + voter
        parts = tl.load(
            lses + row * num_splits + split, mask=split < num_splits, other=float("-inf")
        )  # [S]
        peak = tl.max(parts, 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)  # no candidates: scores are -inf as well
        total = tl.sum(tl.exp2(parts - base), 0)
        found = tl.load(scores + row * capacity + n, mask=scored, other=float("-inf"))  # [P, E]
        known = known | (found > float("-inf"))
        vote += tl.exp2(found - base) / tl.where(total > 0.0, total, 1.0)
    if REDUCE == "max":
        result = tl.max(tl.where(known, vote, float("-inf")), 1)  # [P]
    else:
        result = tl.sum(vote, 1)
        result = tl.where(tl.max(known.to(tl.int32), 1) > 0, result, float("-inf"))
    tl.store(out + ballot * num_pages + page, result, mask=page < num_pages)


class QueryScores(Kernel):
    """`query_scores` as Triton text: scores of candidates and their log-sum-exp."""

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


class PageScores(Kernel):
    """`page_scores` as Triton text: the vote; `form` is `"max"` or `"sum"` over a page."""

    operator: ClassVar[str] = "page_scores"
    backend: ClassVar[str] = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel.supports`. A page of one entry scores entries."""
        reason = refusal(description, masks=("full",), forms=("max", "sum"))
        if reason is None and not 1 <= description.page_size <= MAX_PAGE_SIZE:
            return f"page_size={description.page_size}, allowed: 1 to {MAX_PAGE_SIZE}"
        return reason

    def source(self, description: KernelDescription) -> str:
        """See `Kernel.source`."""
        require(self, description)
        integers = (
            "batch_size",
            "num_ballots",
            "num_voters",
            "capacity",
            "num_splits",
            "num_pages",
        )
        return generate(
            page_scores_kernel,
            description=description,
            source_url="https://arxiv.org/abs/2411.02886",
            signature={
                **dict.fromkeys(("scores", "lses", "out"), pointer(torch.float32)),
                **dict.fromkeys(("starts", "stops"), pointer(torch.int64)),
                **dict.fromkeys(integers, "i32"),
            },
            constants={
                "LAYOUT": description.layout,
                "PAGE_SIZE": description.page_size,
                "REDUCE": description.form,
                "BLOCK_P": _pages_of_a_program(description),
                "BLOCK_E": triton.next_power_of_2(description.page_size),
                "BLOCK_S": _MAX_SPLITS,
            },
            launch=Launch(
                ("batch_size * num_ballots", "cdiv(num_pages, BLOCK_P)"),
                VOTE_CONFIG.num_warps,
                VOTE_CONFIG.num_stages,
            ),
        )


QUERY_SCORES = QueryScores()
PAGE_SCORES = PageScores()
_MAX_SPLITS = 64


def _pages_of_a_program(description: KernelDescription) -> int:
    return max(1, VOTE_CONFIG.block_n // triton.next_power_of_2(description.page_size))


def _choose_splits(description: KernelDescription, programs: int, kv_len: int, q: Tensor) -> int:
    """Splits of at least four tiles, as many as it takes to give every multiprocessor two programs."""
    if not q.is_cuda:
        return 1
    wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count
    tiles = triton.cdiv(kv_len, config_for(description).block_n)
    return max(1, min(triton.cdiv(wanted, max(programs, 1)), tiles // 4, _MAX_SPLITS))


def page_scores(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    *,
    softmax_scale: float,
    starts: Tensor,
    stops: Tensor,
    k_positions: Tensor | None = None,
    block_table: Tensor | None = None,
    per_kv_head: bool = False,
    num_splits: int | None = None,
) -> Tensor:
    """How much the heads want each page.

    Args:
        q: [batch_size, num_heads, head_dim], one query a request (of several, e.g. their mean).
        k: keys in the described layout (see `entries`).
        starts, stops: int64 [batch_size], positions from and before which entries are candidates;
            stops is at most the number of entries in use.
        k_positions: of `slots`; block_table: of `paged`.
        per_kv_head: heads of one KV head vote by themselves; otherwise all heads vote together.
        num_splits: up to 64; None = from the device.

    Returns:
        fp32 [batch_size, num_kv_heads or 1, num_pages]; -inf for pages without a candidate.

    Raises:
        InputError: tensors that are not as described.
    """
    check_tensors(description, q=q.unsqueeze(2), k=k)
    (batch_size, num_heads, _), num_kv_heads = q.shape, k.shape[1]
    index = index_of(description.layout, starts, k_positions, block_table)
    check_cache(description, q, k, None, index[0], starts=starts, stops=stops)
    entries = capacity(description.layout, k, block_table)
    if num_splits is None:
        num_splits = _choose_splits(description, batch_size * num_kv_heads, entries, q)
    if not 1 <= num_splits <= _MAX_SPLITS:
        raise InputError(f"num_splits={num_splits}, allowed: 1 to {_MAX_SPLITS}")
    scores = q.new_empty((batch_size, num_heads, entries), dtype=torch.float32)
    lses = scores.new_empty((batch_size, num_heads, num_splits))
    ballots = num_kv_heads if per_kv_head else 1
    pages = triton.cdiv(entries, description.page_size)
    out = scores.new_empty((batch_size, ballots, pages))
    strides = (*q.stride()[:2], *k.stride()[:3], *index[1:])
    sizes = (batch_size, num_kv_heads, entries, num_splits)
    tensors = (q, k, starts, stops, index[0], scores, lses)
    grid = (batch_size * num_kv_heads, num_splits)
    run(QUERY_SCORES, description, grid, (*tensors, softmax_scale, *sizes, *strides))
    grid = (batch_size * ballots, triton.cdiv(pages, _pages_of_a_program(description)))
    sizes = (batch_size, ballots, num_heads // ballots, entries, num_splits, pages)
    run(PAGE_SCORES, description, grid, (scores, lses, starts, stops, out, *sizes))
    return out


def top_pages(scores: Tensor, count: int) -> Tensor:
    """The pages that got most, int64 [..., min(count, num_pages)], -1 where there are too few."""
    values, pages = scores.topk(min(count, scores.shape[-1]), dim=-1)
    return pages.masked_fill(values == -torch.inf, -1)


def page_scores_reference(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    *,
    softmax_scale: float,
    starts: Tensor,
    stops: Tensor,
    index: Tensor,
    per_kv_head: bool = False,
) -> Tensor:
    """The same in plain PyTorch."""
    d, num_heads = description, q.shape[1]
    everything = torch.full_like(stops, k.shape[2])
    lens = everything if d.layout == "slots" else stops
    k, positions = gathered(d.layout, k, index, lens)
    scores = (repeat_kv(k.float(), num_heads) @ q.float().unsqueeze(-1)).squeeze(-1) * softmax_scale
    if d.softcap:
        scores = d.softcap * torch.tanh(scores / d.softcap)
    first, end = starts.view(-1, 1, 1), stops.view(-1, 1, 1)
    known = (positions >= first) & (positions < end) & (positions >= 0)
    known = known.repeat_interleave(num_heads // known.shape[1], 1)
    votes = scores.masked_fill(~known, -torch.inf).softmax(-1).masked_fill(~known, 0.0)
    shape = (q.shape[0], k.shape[1] if per_kv_head else 1, -1, k.shape[2])
    known, votes = known.view(shape).any(2), votes.view(shape).sum(2)
    padding = (0, -k.shape[2] % d.page_size)
    known = torch.nn.functional.pad(known, padding).unflatten(-1, (-1, d.page_size))
    votes = torch.nn.functional.pad(votes, padding).unflatten(-1, (-1, d.page_size))
    if d.form == "max":
        return votes.masked_fill(~known, -torch.inf).amax(-1)
    return votes.sum(-1).masked_fill(~known.any(-1), -torch.inf)


def page_scores_cost(
    description: KernelDescription, batch_size: int, num_heads: int, kv_len: int
) -> Cost:
    """One product over the candidates, keys read once, scores written and read once."""
    pairs = batch_size * num_heads * kv_len
    keys = pairs / description.group_size * description.head_dim * description.dtype.itemsize
    pages = 4.0 * batch_size * kv_len / description.page_size
    return Cost(2.0 * pairs * description.head_dim + 2.0 * pairs, keys + 8.0 * pairs + pages, 2)
