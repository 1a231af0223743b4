"""Attention of many queries over contiguous keys and values; masked tiles cost nothing.

    out = softmax(softcap(q kᵀ · softmax_scale) + terms, masked by structure and by tiles) v
    lse = log Σ exp(the same scores)

Layout: q bhsd [batch_size, num_heads, q_len, head_dim], k and v bhsd [batch_size, num_kv_heads, kv_len,
d]; any strides, the last dimension contiguous; out bhsd, contiguous. Queries are consecutive: entry n
of request b stands at position n - starts[b], query t at q_start + t - starts[b]; before `starts` is
padding. Query head h reads KV head h // group_size.

One program takes `block_m` queries of one head. It visits the tiles of `block_n` entries that its mask
lets it see: a range, plus the tiles of the sinks before it; with `form="block_mask"` the tiles listed
for its block instead, each still masked by the structure. Scores and sums are fp32; weights are rounded
to the values' dtype for the second product. Rows that see nothing give 0 and an lse of -inf. Bytes
moved: q, out and lse once, visible keys and values once per block of queries (from the cache mostly).
Source: https://arxiv.org/abs/2307.08691; sinks: https://arxiv.org/abs/2309.17453; tiles:
https://arxiv.org/abs/2407.02490
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# What tl.range and tl.minimum give has other types inside kernels than outside.
from __future__ import annotations

import itertools
from collections.abc import Sequence
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
    refusal,
    require,
    stride_type,
    tile_width,
    value_width,
    visible_entries,
)
from codegen.triton_kernels.generate import Launch, generate, pointer, run
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
from rewriter.errors import InputError

__all__ = [
    "CONFIGS",
    "PREFILL_ATTENTION",
    "PrefillAttention",
    "PrefillConfig",
    "config_for",
    "listed_tiles",
    "prefill_attention",
    "prefill_attention_kernel",
    "prefill_cost",
    "prefill_reference",
]


@dataclass(frozen=True)
class PrefillConfig:
    """Tile sizes of one program, which are those of a block mask, and how the compiler schedules it.

    Attributes:
        block_m: queries of a tile; block_n: entries of a tile. Powers of two, 16 or more.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


CONFIGS = {
    "16-bit 64": PrefillConfig(128, 64, num_warps=8),
    "16-bit 128": PrefillConfig(128, 32, num_warps=8, num_stages=3),
    "16-bit 256": PrefillConfig(64, 32, num_warps=8),
    "float32 64": PrefillConfig(32, 32, num_warps=8),
    "float32 128": PrefillConfig(32, 16, num_warps=8),
    "float32 256": PrefillConfig(16, 16, num_warps=8, num_stages=1),
}
"""By dtype and the widest head. Taken from what the compiler says, not from timings: large tiles that fit
into 64 KiB of shared memory on gfx942 and leave every value of heads up to 128 in registers on sm_80, sm_90
and gfx942. fp32 products run outside of tensor cores and keep whole rows of both tiles in registers."""


def config_for(description: KernelDescription) -> PrefillConfig:
    """The shipped configuration; addresses of a bias take as many registers again as its tile."""
    config = CONFIGS[config_key(description)]
    biased = "bias" in description.terms or "seen" in description.terms
    if not biased:
        return config
    return replace(config, block_m=min(config.block_m, 64), block_n=min(config.block_n, 32))


@triton.jit
def prefill_attention_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    starts: tl.tensor,  # [batch_size]
    tiles: tl.tensor,  # [batch_size, num_heads, q blocks, kv blocks]: kv blocks to visit
    tile_counts: tl.tensor,  # [batch_size, num_heads, q blocks]: how many of them
    out: tl.tensor,
    lse: tl.tensor,
    bias: tl.tensor,  # these three are read where the constants say so
    sinks: tl.tensor,
    slopes: tl.tensor,
    softmax_scale: tl.tensor,
    batch_size: tl.tensor,
    num_heads: tl.tensor,
    q_len: tl.tensor,
    kv_len: tl.tensor,
    q_start: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    list_batch: tl.tensor,  # strides of tile_counts; 0 where requests or heads share a list
    list_head: tl.tensor,
    bias_batch: tl.tensor,
    bias_head: tl.tensor,
    bias_row: tl.tensor,
    bias_entry: tl.tensor,
    # +operands
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_SINK_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPED: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """Up to BLOCK_M queries of one head."""
    # The last blocks have most to do under a causal mask, so they come first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    request = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    d = tl.arange(0, BLOCK_D)  # [D]
    c = tl.arange(0, BLOCK_V)  # [V]
    in_rows = t < q_len
    start = tl.load(starts + request).to(tl.int32)
    i = tl.where(in_rows, q_start + t - start, -1)  # [M]
    queries = tl.load(
        q + request * q_batch + head * q_head + t.to(tl.int64)[:, None] * q_row + d[None, :],
        mask=in_rows[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )  # [M, D]

    # Tiles to visit: those of the sinks, [first_sink, first_sink + pinned), then those from low_tile on.
    first = tl.maximum(q_start + block * BLOCK_M - start, 0)
    last = tl.minimum(q_start + tl.minimum(block * BLOCK_M + BLOCK_M, q_len), kv_len) - 1 - start
    low, high = entry_range(first, last, kv_len - start, MASK, SPAN)
    low_tile = (low + start) // BLOCK_N
    first_sink = start // BLOCK_N
    pinned = start * 0
    if MASK == "sinks_window":
        pinned = tl.minimum(tl.cdiv(start + NUM_SINK_TOKENS, BLOCK_N), low_tile) - first_sink
    num_tiles = pinned + tl.maximum(tl.cdiv(high + start, BLOCK_N) - low_tile, 0)
    listed = request * list_batch + head * list_head + block
    if LISTED:
        num_tiles = tl.load(tile_counts + listed).to(tl.int32)

    k += request * k_batch + head // GROUP_SIZE * k_head
    v += request * v_batch + head // GROUP_SIZE * v_head
    slope = 0.0
    if SLOPED:
        slope = tl.load(slopes + head)
    if BIAS != "":
        bias += (
            request * bias_batch + head * bias_head + t.to(tl.int64)[:, None] * bias_row
        )  # [M, 1]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for turn in tl.range(0, num_tiles):
        if LISTED:
            tile = tl.load(tiles + listed * tl.cdiv(kv_len, BLOCK_N) + turn).to(tl.int32)
        else:
            tile = tl.where(turn < pinned, first_sink + turn, low_tile + turn - pinned)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
        j = tl.where(n < kv_len, n - start, -1)
        holds = j >= 0
        row = n.to(tl.int64)[:, None]
        keys = tl.load(
            k + row * k_row + d[None, :],
            mask=holds[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )  # [N, D]
        values = tl.load(
            v + row * v_row + c[None, :],
            mask=holds[:, None] & (c < VALUE_DIM)[None, :],
            other=0.0,
        )  # [N, V]
        scores = product(queries, tl.trans(keys)) * softmax_scale  # [M, N]
        scores = capped(scores, SOFTCAP)
        if BIAS != "" or SLOPED:
            added = bias + n.to(tl.int64)[None, :] * bias_entry
            scores = with_terms(
                scores,
                j[None, :] - i[:, None],
                slope,
                added,
                in_rows[:, None] & (n < kv_len)[None, :],
                BIAS,
                SLOPED,
            )
        scores *= LOG2_E
        keep = sees(i[:, None], j[None, :], MASK, SPAN, NUM_SINK_TOKENS)
        scores = tl.where(keep, scores, float("-inf"))
        weights, shrink, peak, total = fold_in(scores, peak, total)
        acc = acc * shrink[:, None]
        acc += product(weights.to(values.dtype), values)  # [M, V]

    if SINKS:
        acc, peak, total = join_sink(acc, peak, total, tl.load(sinks + head) * LOG2_E)
    acc, row_lse = finish(acc, peak, total)
    flat = (request * num_heads + head) * q_len + t
    # +epilogue: acc [flat[:, None], c[None, :]] mask [in_rows[:, None], (c < VALUE_DIM)[None, :]]
    tl.store(
        out + flat[:, None] * VALUE_DIM + c[None, :],
        acc.to(out.dtype.element_ty),
        mask=in_rows[:, None] & (c < VALUE_DIM)[None, :],
    )
    tl.store(lse + flat, row_lse, mask=in_rows)


class PrefillAttention(TunedKernel[PrefillConfig]):
    """`prefill_attention` as Triton text; `form` is `""` or `"block_mask"`."""

    operator: ClassVar[str] = "prefill_attention"
    backend: ClassVar[str] = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel.supports`."""
        return refusal(
            description, layouts=("bhsd",), forms=("", "block_mask"), terms=TERMS, epilogue=True
        )

    def config_for(self, description: KernelDescription) -> PrefillConfig:
        """See `TunedKernel`."""
        return config_for(description)

    def candidates(self, description: KernelDescription) -> tuple[PrefillConfig, ...]:
        """See `TunedKernel`; a block mask's tiles are those that ship."""
        plain = config_for(description)
        tiles = [(m, n) for m in (32, 64, 128) for n in (32, 64, 128)]
        if description.form == "block_mask":
            tiles = [(plain.block_m, plain.block_n)]
        space = itertools.product(tiles, (4, 8), (1, 2, 3))
        return tuple(PrefillConfig(m, n, warps, stages) for (m, n), warps, stages in space)

    def configured_source(self, description: KernelDescription, config: PrefillConfig) -> str:
        """See `TunedKernel`."""
        require(self, description)
        head_dim, value_dim = description.head_dim, value_width(description)
        integers = ("batch_size", "num_heads", "q_len", "kv_len", "q_start")
        strides = [f"{tensor}_{of}" for tensor in "qkv" for of in ("batch", "head", "row")]
        return generate(
            prefill_attention_kernel,
            description=description,
            source_url="https://arxiv.org/abs/2307.08691",
            signature={
                **dict.fromkeys("qkv", pointer(description.dtype)),
                **dict.fromkeys(("starts", "tiles", "tile_counts"), pointer(torch.int64)),
                "out": pointer(_result_dtype(description)),
                "lse": pointer(torch.float32),
                **term_signature(description),
                "softmax_scale": "fp32",
                **dict.fromkeys(integers, "i32"),
                **dict.fromkeys(strides, stride_type(head_dim, value_dim)),
                **dict.fromkeys(("list_batch", "list_head"), "i64"),
            },
            constants={
                "GROUP_SIZE": description.group_size,
                "HEAD_DIM": head_dim,
                "VALUE_DIM": value_dim,
                "MASK": description.mask,
                "SPAN": description.span,
                "NUM_SINK_TOKENS": description.num_sink_tokens,
                "SOFTCAP": description.softcap,
                **term_constants(description),
                "LISTED": description.form == "block_mask",
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_D": tile_width(head_dim),
                "BLOCK_V": tile_width(value_dim),
            },
            launch=Launch(
                ("batch_size * num_heads", "cdiv(q_len, BLOCK_M)"),
                config.num_warps,
                config.num_stages,
            ),
            epilogue=description.epilogue,
        )


PREFILL_ATTENTION = PrefillAttention()


def _result_dtype(description: KernelDescription) -> torch.dtype:
    epilogue = description.epilogue
    return epilogue.dtype if epilogue and epilogue.dtype else description.dtype


def listed_tiles(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """A block mask as lists of the tiles to compute.

    Args:
        block_mask: bool [..., num_q_blocks, num_kv_blocks], True = compute.

    Returns:
        int64 [..., num_q_blocks, num_kv_blocks] whose first entries are the tiles in order, and how
        many there are, int64 [..., num_q_blocks].
    """
    tiles = block_mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return tiles, block_mask.sum(-1)


def _lists(
    description: KernelDescription, q: Tensor, kv_len: int, block_mask: Tensor | None
) -> tuple[Tensor, Tensor, int, int]:
    """Tiles, their counts and the strides of counts; any tensor where the form reads none."""
    if (block_mask is not None) != (description.form == "block_mask"):
        raise InputError(f"form={description.form!r} and a block_mask go together or not at all")
    if block_mask is None:
        unread = torch.empty(1, dtype=torch.int64, device=q.device)
        return unread, unread, 0, 0
    config = config_for(description)
    blocks = (triton.cdiv(q.shape[2], config.block_m), triton.cdiv(kv_len, config.block_n))
    lists = block_mask.reshape((1,) * (4 - block_mask.dim()) + block_mask.shape)
    fits = all(n in (1, of) for n, of in zip(lists.shape[:2], q.shape[:2], strict=True))
    if lists.dim() != 4 or tuple(lists.shape[2:]) != blocks or not fits:
        told = f"block_mask: shape {tuple(block_mask.shape)}"
        raise InputError(f"{told}, allowed: [batch_size, num_heads, *{blocks}], the first two or 1")
    tiles, counts = listed_tiles(lists)
    strides = [
        0 if n == 1 else s for n, s in zip(lists.shape[:2], counts.stride()[:2], strict=True)
    ]
    return tiles.contiguous(), counts, strides[0], strides[1]


def prefill_attention(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor] = (),
    *,
    softmax_scale: float,
    q_start: int | None = None,
    starts: Tensor | None = None,
    block_mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of consecutive queries, then the description's epilogue.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim].
        k, v: bhsd [batch_size, num_kv_heads, kv_len, head_dim or value_dim].
        operands: tensors of the epilogue.
        q_start: entry of the first query; None = the queries are the last q_len of kv_len.
        starts: int64 [batch_size], entries of padding before each request; None = none.
        block_mask: bool [num_q_blocks, num_kv_blocks], also with batch_size and num_heads (or 1) in
            front, of tiles as large as `config_for` says, True = compute. Tiles that the mask's
            structure hides should be False: they are computed for nothing.
        bias, sinks, slopes: the terms that the description names (see `score_terms`).
        config: None = by the rule of `codegen.tuning`; with a block mask of the tiles that ship.

    Returns:
        out bhsd [batch_size, num_heads, q_len, value_dim] and lse fp32 [batch_size, num_heads, q_len].

    Raises:
        InputError: tensors that are not as described.
    """
    check_tensors(description, q=q, k=k, v=v)
    (batch_size, num_heads, q_len, _), kv_len = q.shape, k.shape[2]
    if starts is None:
        starts = torch.zeros(batch_size, dtype=torch.int64, device=q.device)
    check_cache(description, q, k, v, starts, starts=starts)
    tiles, counts, *list_strides = _lists(description, q, kv_len, block_mask)
    if config is not None and block_mask is not None:
        plain = config_for(description)
        if (config.block_m, config.block_n) != (plain.block_m, plain.block_n):
            told = f"config: tiles of {config.block_m} x {config.block_n} with a block mask"
            raise InputError(f"{told}, allowed: {plain.block_m} x {plain.block_n}")
    width, epilogue = value_width(description), description.epilogue
    out = q.new_empty((batch_size, num_heads, q_len, width), dtype=_result_dtype(description))
    lse = q.new_empty(out.shape[:-1], dtype=torch.float32)
    extra = epilogue.launch_arguments(operands, lse.numel(), width) if epilogue else []
    q_start = kv_len - q_len if q_start is None else q_start
    terms, bias_strides = term_arguments(description, q, kv_len, bias, sinks, slopes)
    sizes = (batch_size, num_heads, q_len, kv_len, q_start)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *list_strides, *bias_strides)
    tensors = (q, k, v, starts, tiles, counts, out, lse, *terms)
    arguments = (*tensors, softmax_scale, *sizes, *strides, *extra)

    def launch(config: PrefillConfig) -> None:
        grid = (batch_size * num_heads, triton.cdiv(q_len, config.block_m))
        run(PREFILL_ATTENTION, description, grid, arguments, config)

    def asked() -> dict[str, int]:
        names = ("batch_size", "num_heads", "q_len", "kv_len", "q_start")
        return {
            **dict(zip(names, sizes, strict=True)),
            "num_kv_heads": k.shape[1],
            "entries": visible_entries(description, kv_len),
        }

    device = q.device
    launch(config or config_of_launch(PREFILL_ATTENTION, description, device, asked, launch))
    return out, lse


def prefill_reference(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    q_start: int,
    starts: Tensor,
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: fp32 throughout, without an epilogue."""
    d, config = description, config_for(description)
    j = torch.arange(k.shape[2], device=q.device) - starts.view(-1, 1, 1)
    i = torch.arange(q.shape[2], device=q.device) + q_start - starts.view(-1, 1, 1)
    keep = structure(i, j, d.mask, d.span, d.num_sink_tokens)
    if block_mask is not None:
        wide = block_mask.repeat_interleave(config.block_n, -1)[..., : k.shape[2]]
        tiles = wide.repeat_interleave(config.block_m, -2)[..., : q.shape[2], :]
        keep = keep & tiles
    k, v = (x.masked_fill((j < 0).unsqueeze(-1), 0.0) for x in (k, v))
    weights, lse = probabilities(d, q, k, keep, softmax_scale)
    return weights @ repeat_kv(v.float(), q.shape[1]), lse


def prefill_cost(
    description: KernelDescription, batch_size: int, num_heads: int, q_len: int, kv_len: int
) -> Cost:
    """Both products over visible entries (half of them, where every earlier one is); all read once."""
    width = description.head_dim + value_width(description)
    entries = float(visible_entries(description, kv_len))
    if description.mask in ("causal", "prefix"):
        entries -= (q_len - 1) / 2
    rows = batch_size * num_heads * q_len
    cached = batch_size * num_heads // description.group_size * kv_len
    moved = (cached + rows) * width * description.dtype.itemsize + 4.0 * rows
    return Cost(2.0 * rows * entries * width, moved, 1)
