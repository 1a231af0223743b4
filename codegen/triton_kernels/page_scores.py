"""How much each page of a cache matters to a decoded token: a vote of the heads.

    p[h, n] = softmax over candidates n of softcap(q_h k_n · softmax_scale)
    vote[n] = Σ_h p[h, n];  page = max, or sum, of vote over its entries

Candidates stand at positions starts[b] <= position < stops[b]. The heads that vote together are all of
them, or those of one KV head. Pages are `page_size` consecutive entries of a request; the top ones are
then chosen by `top_pages`. Layouts: scores fp32 [batch_size, num_heads, capacity] and their lse
[batch_size, num_heads, num_splits], from `query_scores`, are kept between the two kernels, because they
are smaller by far than the keys (num_heads · 4 bytes of an entry against num_kv_heads · head_dim · 2); out
fp32 [batch_size, num_ballots, num_pages]; all contiguous. One program takes a few pages, head after head.
Accumulation is fp32. Bytes moved: scores of candidates once, pages once.
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
)
from codegen.triton_kernels.entries import capacity, gathered, index_of
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from codegen.triton_kernels.query_scores import (
    MAX_SPLITS,
    choose_splits,
    query_scores,
    query_scores_cost,
)
from codegen.triton_kernels.whole_softmax import probabilities
from rewriter.cost.cost import Cost
from rewriter.errors import InputError

__all__ = [
    "MAX_PAGE_SIZE",
    "PAGE_SCORES",
    "VOTE_CONFIG",
    "PageScores",
    "VoteConfig",
    "page_scores",
    "page_scores_cost",
    "page_scores_kernel",
    "page_scores_reference",
    "top_pages",
]

MAX_PAGE_SIZE = 1024


@dataclass(frozen=True)
class VoteConfig:
    """Entries that one program lets the heads vote on, in whole pages."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 2


VOTE_CONFIG = VoteConfig(256)
"""Two entries for each of 128 threads. Not from timings."""


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
                "BLOCK_S": MAX_SPLITS,
            },
            launch=Launch(
                ("batch_size * num_ballots", "cdiv(num_pages, BLOCK_P)"),
                VOTE_CONFIG.num_warps,
                VOTE_CONFIG.num_stages,
            ),
        )


PAGE_SCORES = PageScores()


def _pages_of_a_program(description: KernelDescription) -> int:
    return max(1, VOTE_CONFIG.block_n // triton.next_power_of_2(description.page_size))


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
        num_splits = choose_splits(description, batch_size * num_kv_heads, entries, q)
    if not 1 <= num_splits <= MAX_SPLITS:
        raise InputError(f"num_splits={num_splits}, allowed: 1 to {MAX_SPLITS}")
    scores, lses = query_scores(
        description,
        q,
        k,
        starts,
        stops,
        index,
        entries,
        softmax_scale=softmax_scale,
        num_splits=num_splits,
    )
    ballots = num_kv_heads if per_kv_head else 1
    pages = triton.cdiv(entries, description.page_size)
    out = scores.new_empty((batch_size, ballots, pages))
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
    first, end = starts.view(-1, 1, 1), stops.view(-1, 1, 1)
    known = (positions >= first) & (positions < end) & (positions >= 0)
    votes, _ = probabilities(d, q.unsqueeze(2), k, known.unsqueeze(2), softmax_scale)
    known = known.repeat_interleave(num_heads // known.shape[1], 1)
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
    pages = 4.0 * batch_size * kv_len / description.page_size
    votes = Cost(2.0 * pairs, 4.0 * pairs + pages, 1)
    return query_scores_cost(description, batch_size, num_heads, kv_len) + votes
