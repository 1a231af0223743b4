"""Attention of few new tokens over a KV cache, its entries split among programs.

    out = softmax(softcap(q kᵀ · softmax_scale) + terms, masked by positions) v
    lse = log Σ exp(the same scores)

Layouts: q bhsd [batch_size, num_heads, q_len, head_dim]; the cache as in `entries`. Any strides, the
last dimension contiguous. Partial outputs are [num_splits, batch_size, num_heads, q_len, value_dim].

One program takes one KV head of one request, up to `block_m` rows and one split of the entries. The
rows of a tile are the query heads of the group times the new tokens, so that an entry is read once
for all of them: row r is token r % q_len of head r // q_len of the group, of request
r // (q_len · group_size) beyond the program's own. The last part is how a prefix that many requests
share is read once for all of them: launch with one "request" whose rows are everybody's.

Entries outside of the mask's window are skipped by the bounds of the loop, and splits divide what is
left, so they are even. Scores and sums are fp32; weights are rounded to the values' dtype for the
second product. Rows that see nothing give 0 and an lse of -inf. Bytes moved: visible keys and values
once, q and out once per split. Source: https://pytorch.org/blog/flash-decoding and
https://arxiv.org/abs/2205.14135; GQA: https://arxiv.org/abs/2305.13245
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# What tl.range and tl.min give has other types inside kernels than outside.
from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
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
    query_positions,
    refusal,
    require,
    stride_type,
    tile_width,
    value_width,
    visible_entries,
)
from codegen.triton_kernels.entries import capacity, gathered, index_of, locate
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from codegen.triton_kernels.merge_lse import merge_lse
from codegen.triton_kernels.online_softmax import LOG2_E, capped, finish, fold_in
from codegen.triton_kernels.product import product
from codegen.triton_kernels.score_terms import (
    TERMS,
    join_sink,
    term_arguments,
    term_constants,
    term_signature,
    with_terms,
)
from codegen.triton_kernels.tuned import TunedKernel, config_of_launch
from codegen.triton_kernels.visibility import entry_range, sees, structure
from codegen.triton_kernels.whole_softmax import probabilities
from rewriter.cost.cost import Cost
from rewriter.dialect.attention import repeat_kv

__all__ = [
    "CONFIGS",
    "DECODE_ATTENTION",
    "DecodeAttention",
    "DecodeConfig",
    "attend_splits",
    "choose_splits",
    "config_for",
    "decode_attention",
    "decode_attention_kernel",
    "decode_cost",
    "decode_reference",
    "even_splits",
    "merging",
]


@dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes of one program and how the compiler schedules it.

    Attributes:
        block_m: rows of a tile, a power of two of at least 16, the least that tensor cores take.
        block_n: entries of a tile.
        num_splits: parts of the entries, 0 = by `choose_splits`.
    """

    block_m: int = 16
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2
    num_splits: int = 0


CONFIGS = {
    "16-bit 64": DecodeConfig(),
    "16-bit 128": DecodeConfig(),
    "16-bit 256": DecodeConfig(block_n=32),
    "16-bit 64 shared": DecodeConfig(128, 64, num_warps=8),
    "16-bit 128 shared": DecodeConfig(128, 32, num_warps=8, num_stages=3),
    "16-bit 256 shared": DecodeConfig(32, 32),
    "float32 64": DecodeConfig(block_n=32, num_warps=8, num_stages=1),
    "float32 128": DecodeConfig(block_n=16),
    "float32 256": DecodeConfig(block_n=16, num_warps=8),
}
"""By dtype, the widest head, and whether requests share the entries, which gives many rows. Taken from
what the compiler says, not from timings: large tiles that leave every value in registers on sm_80, sm_90
and gfx942. fp32 products run outside of tensor cores and keep whole rows of both tiles in registers."""


def config_for(description: KernelDescription) -> DecodeConfig:
    """The shipped configuration."""
    key = config_key(description)
    return CONFIGS.get(f"{key} {description.form}", CONFIGS[key])


@triton.jit
def decode_attention_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_positions: tl.tensor,  # [batch_size, q_len], -1 = padding
    index: tl.tensor,  # see `entries`
    kv_lens: tl.tensor,  # [batch_size]: entries in use; of slots the capacity
    out: tl.tensor,
    lse: tl.tensor,
    bias: tl.tensor,  # these three are read where the constants say so
    sinks: tl.tensor,
    slopes: tl.tensor,
    softmax_scale: tl.tensor,
    num_kv_heads: tl.tensor,
    q_len: tl.tensor,
    num_rows: tl.tensor,  # of one KV head of one request, or of all that share a prefix
    all_rows: tl.tensor,  # batch_size * num_heads * q_len
    num_splits: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    index_batch: tl.tensor,
    index_head: tl.tensor,
    bias_batch: tl.tensor,
    bias_head: tl.tensor,
    bias_row: tl.tensor,
    bias_entry: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MASK: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_SINK_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """One KV head of one request, up to BLOCK_M rows, one split of the entries."""
    request = tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(2)
    r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    d = tl.arange(0, BLOCK_D)  # [D]
    c = tl.arange(0, BLOCK_V)  # [V]
    asks = r < num_rows
    asker = (request + r // (q_len * GROUP_SIZE)).to(tl.int64)
    head = kv_head * GROUP_SIZE + r // q_len % GROUP_SIZE
    token = r % q_len

    i = tl.load(q_positions + asker * q_len + token, mask=asks, other=-1).to(tl.int32)  # [M]
    rows = asker * q_batch + head.to(tl.int64) * q_head + token.to(tl.int64) * q_row
    queries = tl.load(
        q + rows[:, None] + d[None, :],
        mask=asks[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )  # [M, D]

    # The entries that some row sees: the sinks [0, pinned) and [low, high). Splits divide them.
    kv_len = tl.load(kv_lens + request).to(tl.int32)
    low = kv_len * 0
    high = kv_len
    if LAYOUT != "slots":
        first_position = tl.min(tl.where(i < 0, 2147483647, i), 0)
        low, high = entry_range(first_position, tl.max(i, 0), kv_len, MASK, SPAN)
    pinned = kv_len * 0
    if MASK == "sinks_window":
        pinned = tl.minimum(low, NUM_SINK_TOKENS)
    visible = pinned + tl.maximum(high - low, 0)
    share = tl.cdiv(tl.cdiv(visible, num_splits), BLOCK_N) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, visible)

    k += kv_head.to(tl.int64) * k_head
    v += kv_head.to(tl.int64) * v_head
    slope = tl.zeros([BLOCK_M, 1], tl.float32)
    if SLOPED:
        slope = tl.load(slopes + head)[:, None]
    if BIAS != "":
        bias += asker[:, None] * bias_batch + head.to(tl.int64)[:, None] * bias_head
        bias += token.to(tl.int64)[:, None] * bias_row  # [M, 1]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for first in tl.range(start, stop, BLOCK_N):
        turn = first + tl.arange(0, BLOCK_N)  # [N]
        live = turn < stop
        n = turn + (low - pinned)
        if MASK == "sinks_window":
            n = tl.where(turn < pinned, turn, n)
        place, row, j = locate(
            n, live, index, index_batch, index_head, request, kv_head, LAYOUT, PAGE_SIZE
        )
        holds = j >= 0  # empty slots may hold anything, NaN included
        keys = tl.load(
            k + (place * k_batch + row.to(tl.int64) * k_row)[:, None] + d[None, :],
            mask=holds[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )  # [N, D]
        values = tl.load(
            v + (place * v_batch + row.to(tl.int64) * v_row)[:, None] + c[None, :],
            mask=holds[:, None] & (c < VALUE_DIM)[None, :],
            other=0.0,
        )  # [N, V]
        scores = product(queries, tl.trans(keys)) * softmax_scale  # [M, N]
        scores = capped(scores, SOFTCAP)
        if BIAS != "" or SLOPED:
            added = bias + n.to(tl.int64)[None, :] * bias_entry
            told = asks[:, None] & live[None, :]
            distance = j[None, :] - i[:, None]
            scores = with_terms(scores, distance, slope, added, told, BIAS, SLOPED)
        scores *= LOG2_E
        keep = sees(i[:, None], j[None, :], MASK, SPAN, NUM_SINK_TOKENS)
        scores = tl.where(keep, scores, float("-inf"))
        weights, shrink, peak, total = fold_in(scores, peak, total)
        acc = acc * shrink[:, None]
        acc += product(weights.to(values.dtype), values)  # [M, V]

    if SINKS:  # counted once, whatever the splits
        sink = tl.load(sinks + head) * LOG2_E
        acc, peak, total = join_sink(acc, peak, total, tl.where(split == 0, sink, float("-inf")))
    result, row_lse = finish(acc, peak, total)
    # Flat rows: [num_splits, batch_size, num_heads, q_len].
    flat = split.to(tl.int64) * all_rows
    flat += (asker * num_kv_heads * GROUP_SIZE + head) * q_len + token
    tl.store(
        out + flat[:, None] * VALUE_DIM + c[None, :],
        result.to(out.dtype.element_ty),
        mask=asks[:, None] & (c < VALUE_DIM)[None, :],
    )
    tl.store(lse + flat, row_lse, mask=asks)


class DecodeAttention(TunedKernel[DecodeConfig]):
    """`decode_attention` as Triton text; it writes fp32 partial outputs, which `merge_lse` merges.

    With `form="shared"` there is one request's worth of entries, which all requests attend to.
    """

    operator: ClassVar[str] = "decode_attention"
    backend: ClassVar[str] = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel.supports`. Pointwise work on the result belongs to `merge_lse`."""
        terms = () if description.form == "shared" else TERMS
        return refusal(description, forms=("", "shared"), terms=terms)

    def config_for(self, description: KernelDescription) -> DecodeConfig:
        """See `TunedKernel`."""
        return config_for(description)

    def candidates(self, description: KernelDescription) -> tuple[DecodeConfig, ...]:
        """See `TunedKernel`; the rows of a tile stay, as they are as few as tensor cores take."""
        plain = config_for(description)
        space = itertools.product((16, 32, 64, 128), (2, 4, 8), (1, 2, 3), (0, 1, 8, 32))
        names = ("block_n", "num_warps", "num_stages", "num_splits")
        return tuple(replace(plain, **dict(zip(names, knobs, strict=True))) for knobs in space)

    def configured_source(self, description: KernelDescription, config: DecodeConfig) -> str:
        """See `TunedKernel`."""
        require(self, description)
        head_dim, value_dim = description.head_dim, value_width(description)
        integers = ("num_kv_heads", "q_len", "num_rows", "all_rows", "num_splits")
        strides = [f"{tensor}_{of}" for tensor in "qkv" for of in ("batch", "head", "row")]
        return generate(
            decode_attention_kernel,
            description=description,
            source_url="https://pytorch.org/blog/flash-decoding",
            signature={
                **dict.fromkeys("qkv", pointer(description.dtype)),
                **dict.fromkeys(("q_positions", "index", "kv_lens"), pointer(torch.int64)),
                **dict.fromkeys(("out", "lse"), pointer(torch.float32)),
                **term_signature(description),
                "softmax_scale": "fp32",
                **dict.fromkeys(integers, "i32"),
                **dict.fromkeys(strides, stride_type(head_dim, value_dim)),
                **dict.fromkeys(("index_batch", "index_head"), "i64"),
            },
            constants={
                "GROUP_SIZE": description.group_size,
                "HEAD_DIM": head_dim,
                "VALUE_DIM": value_dim,
                "LAYOUT": description.layout,
                "PAGE_SIZE": description.page_size,
                "MASK": description.mask,
                "SPAN": description.span,
                "NUM_SINK_TOKENS": description.num_sink_tokens,
                "SOFTCAP": description.softcap,
                **term_constants(description),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_D": tile_width(head_dim),
                "BLOCK_V": tile_width(value_dim),
            },
            launch=Launch(
                ("all_rows // num_rows", "cdiv(num_rows, BLOCK_M)", "num_splits"),
                config.num_warps,
                config.num_stages,
            ),
        )


DECODE_ATTENTION = DecodeAttention()


def choose_splits(
    description: KernelDescription,
    programs: int,
    kv_len: int,
    q: Tensor,
    config: DecodeConfig | None = None,
) -> int:
    """Splits of at least four tiles, as many as it takes to give every multiprocessor two programs.

    Args:
        programs: of one split.
        kv_len: the most entries of a request; q: on the device that counts.
        config: None = the one that ships.
    """
    if not q.is_cuda:
        return 1
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    block_n = (config or config_for(description)).block_n
    return even_splits(visible_entries(description, kv_len), programs, block_n, multiprocessors)


def even_splits(entries: int, programs: int, block_n: int, multiprocessors: int) -> int:
    """`choose_splits` from numbers alone; programs of one split, entries that are visible."""
    tiles = triton.cdiv(entries, block_n)
    return max(1, min(triton.cdiv(2 * multiprocessors, max(programs, 1)), tiles // 4))


def attend_splits(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_positions: Tensor,
    index: tuple[Tensor, int, int],
    kv_lens: Tensor,
    *,
    softmax_scale: float,
    kv_len: int = 0,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> None:
    """Launch the kernel alone: one partial output and lse for each split.

    Args:
        out: fp32 [num_splits, batch_size, num_heads, q_len, value_dim], contiguous; written.
        lse: fp32 [num_splits, batch_size, num_heads, q_len], contiguous; written.
        index: from `index_of`.
        kv_len: entries that a bias has.
        config: None = the one that ships.
    """
    terms, bias_strides = term_arguments(description, q, kv_len, bias, sinks, slopes)
    shared = description.form == "shared"
    (batch_size, num_heads, q_len, _), num_kv_heads = q.shape, k.shape[1]
    num_rows = description.group_size * q_len * (batch_size if shared else 1)
    requests, num_splits = 1 if shared else batch_size, out.shape[0]
    block_m = (config or config_for(description)).block_m
    grid = (requests * num_kv_heads, triton.cdiv(num_rows, block_m), num_splits)
    sizes = (num_kv_heads, q_len, num_rows, batch_size * num_heads * q_len, num_splits)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *index[1:], *bias_strides)
    tensors = (q, k, v, q_positions, index[0], kv_lens, out, lse, *terms)
    run(DECODE_ATTENTION, description, grid, (*tensors, softmax_scale, *sizes, *strides), config)


def decode_attention(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None = None,
    *,
    softmax_scale: float,
    kv_lens: Tensor | None = None,
    k_positions: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q over cached entries, split and merged.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim].
        k, v: the cache in the described layout (see `entries`).
        q_positions: int64 [batch_size, q_len], -1 = padding; None = the last q_len of the capacity.
        kv_lens: int64 [batch_size], entries in use; None = the capacity.
        k_positions: of `slots`; block_table: of `paged`.
        num_splits: None = from the configuration, or the device.
        bias, sinks, slopes: the terms that the description names (see `score_terms`).
        config: None = by the rule of `codegen.tuning`.

    Returns:
        out bhsd [batch_size, num_heads, q_len, value_dim] in q's dtype, and lse fp32
        [batch_size, num_heads, q_len], a sink counted in.

    Raises:
        InputError: tensors that are not as described.
    """
    check_tensors(description, q=q, k=k, v=v)
    batch_size, num_heads, q_len, _ = q.shape
    kv_len = capacity(description.layout, k, block_table)
    positions = query_positions(q, q_positions, kv_len)
    if kv_lens is None:
        kv_lens = torch.full((batch_size,), kv_len, device=q.device)
    index = index_of(description.layout, kv_lens, k_positions, block_table)
    check_cache(description, q, k, v, index[0], kv_lens=kv_lens)
    rows = (batch_size, num_heads, q_len)

    def launch(config: DecodeConfig) -> tuple[Tensor, Tensor]:
        splits = config.num_splits if num_splits is None else num_splits
        if not splits:
            splits = choose_splits(description, batch_size * k.shape[1], kv_len, q, config)
        out = q.new_empty((splits, *rows, value_width(description)), dtype=torch.float32)
        lse = out.new_empty(out.shape[:-1])
        attend_splits(
            description,
            q,
            k,
            v,
            out,
            lse,
            positions,
            index,
            kv_lens,
            softmax_scale=softmax_scale,
            kv_len=kv_len,
            bias=bias,
            sinks=sinks,
            slopes=slopes,
            config=config,
        )
        return merge_lse(merging(description), out, lse)

    def told() -> dict[str, int]:
        return {
            **dict(zip(("batch_size", "num_heads", "q_len"), rows, strict=True)),
            "num_kv_heads": k.shape[1],
            "kv_len": kv_len,
            "num_splits": num_splits or 0,
            "entries": visible_entries(description, kv_len),
        }

    return launch(config or config_of_launch(DECODE_ATTENTION, description, q.device, told, launch))


def merging(description: KernelDescription) -> KernelDescription:
    """How the partial outputs of an attention are merged."""
    width = value_width(description)
    return KernelDescription(operator="merge_lse", dtype=description.dtype, head_dim=width)


def decode_reference(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    *,
    softmax_scale: float,
    index: Tensor,
    kv_lens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: fp32 throughout, out in fp32."""
    d = description
    k, positions = gathered(d.layout, k, index, kv_lens)
    v, _ = gathered(d.layout, v, index, kv_lens)
    keep = structure(q_positions.unsqueeze(1), positions, d.mask, d.span, d.num_sink_tokens)
    weights, lse = probabilities(d, q, k, keep, softmax_scale)
    return weights @ repeat_kv(v.float(), q.shape[1]), lse


def decode_cost(
    description: KernelDescription, batch_size: int, num_heads: int, q_len: int, kv_len: int
) -> Cost:
    """Both products over the visible entries; keys and values once, queries and outputs once."""
    width = description.head_dim + value_width(description)
    entries = visible_entries(description, kv_len)
    rows = batch_size * num_heads * q_len
    cached = batch_size * num_heads // description.group_size * entries
    moved = (cached + rows) * width * description.dtype.itemsize + 4.0 * rows
    return Cost(2.0 * rows * entries * width, moved, 2)
