"""Low-rank adapters chosen row by row, dense or gathered from a pool of shards.

    h[m, j]      = Σ_i x[m, i] · A[j, i]                         shrink
    out[m, o]    = epilogue(base[m, o] + scaling · Σ_j h[m, j] · B[j, o])    expand

Row j of A is the concatenation over c of `a_pool[a_index[adapter, j, c]]`, shards of
in_features / chunks contiguous values; row j of B likewise from `b_pool`. A dense adapter is one with
one chunk, its pool being its rows (`pack_adapters`). Layouts: x [rows, in_features],
base and out [rows, out_features], pools [num_shards, width], indices int32
[num_adapters, rank, chunks], -1 = no shard (an adapter of lower rank); adapter_ids int32 [rows],
-1 = none, where the expansion gives the base alone; scaling fp32 [num_adapters].

A program of the first kernel takes one row and one piece of one chunk, all ranks in one tile, and
writes an fp32 part; a program of the second adds the parts of its row, in order, and makes `block_n`
outputs inside one chunk. Bytes moved: for each row the adapter's shards, x, base and out once.
Sources: https://arxiv.org/abs/2310.18547 (batched gather), https://arxiv.org/abs/2410.00938 (shards)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.epilogue import Epilogue
from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels.checks import float_refusal, one_of, rows_of, same_dtype
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from rewriter.cost.cost import Cost
from rewriter.errors import InputError

__all__ = [
    "LORA_EXPAND",
    "LORA_SHRINK",
    "Adapters",
    "lora",
    "lora_cost",
    "lora_reference",
    "pack_adapters",
]

SOURCE_URL = "https://arxiv.org/abs/2410.00938"
MAX_RANK = 128


@dataclass(frozen=True)
class LoraConfig:
    """Tiles of both kernels.

    Attributes:
        block_k: inputs of a step of the first; half as many for ranks above 64.
        piece: inputs of one of its programs, a multiple of `block_k`.
        block_n: outputs of a program of the second.
    """

    block_k: int = 128
    piece: int = 512
    block_n: int = 128
    num_warps: int = 4
    num_stages: int = 2


CONFIG = LoraConfig()
"""A tile of rank 64 is 64 values for each thread; nothing spills at rank 16 to 128 on sm_80, sm_90 and
gfx942; 4096 inputs give each row 8 programs; not timed."""


@dataclass(frozen=True)
class Adapters:
    """Adapters of one linear layer, sharing pools.

    Attributes:
        a_pool: [num_shards, in_features / chunks]; a_index: int32 [num_adapters, rank, chunks].
        b_pool: [num_shards, out_features / chunks]; b_index: as `a_index`, own number of chunks.
        scaling: fp32 [num_adapters], alpha / rank.
    """

    a_pool: Tensor
    a_index: Tensor
    b_pool: Tensor
    b_index: Tensor
    scaling: Tensor


@triton.jit
def lora_shrink_kernel(
    x: tl.tensor,
    pool: tl.tensor,
    index: tl.tensor,
    adapter_ids: tl.tensor,
    partial: tl.tensor,  # fp32 [parts, rows, BLOCK_R]
    rows: int,
    rank: int,
    chunks: int,
    shard_width: int,
    pieces: int,  # programs of one chunk
    x_row: int,
    pool_row: int,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """See the module."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    chunk = part // pieces
    begin = part % pieces * PIECE
    j = tl.arange(0, BLOCK_R)  # [R]
    adapter = tl.load(adapter_ids + row).to(tl.int64)
    wanted = j < tl.where(adapter >= 0, rank, 0)
    place = (adapter * rank + j) * chunks + chunk
    shard = tl.load(index + place, mask=wanted, other=-1).to(tl.int64)  # [R]
    wanted = wanted & (shard >= 0)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for step in range(0, PIECE, BLOCK_K):
        k = begin + step + tl.arange(0, BLOCK_K)  # [K]
        live = k < shard_width
        v = tl.load(x + row * x_row + chunk * shard_width + k, mask=live, other=0.0)
        mask = wanted[:, None] & live[None, :]
        a = tl.load(pool + shard[:, None] * pool_row + k[None, :], mask=mask, other=0.0)  # [R, K]
        acc += a.to(tl.float32) * v.to(tl.float32)[None, :]
    tl.store(partial + (part * rows + row) * BLOCK_R + j, tl.sum(acc, 1))


@triton.jit
def lora_expand_kernel(
    partial: tl.tensor,  # fp32 [parts, rows, BLOCK_R]
    pool: tl.tensor,
    index: tl.tensor,
    adapter_ids: tl.tensor,
    scaling: tl.tensor,
    base: tl.tensor,
    out: tl.tensor,
    rows: int,
    rank: int,
    parts: int,
    chunks: int,
    shard_width: int,
    blocks: int,  # programs of one chunk
    pool_row: int,
    base_row: int,
    out_row: int,
    # +operands
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """See the module."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64) // blocks
    n = tl.program_id(1).to(tl.int64) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    live = n < shard_width
    c = chunk * shard_width + n
    j = tl.arange(0, BLOCK_R)  # [R]
    adapter = tl.load(adapter_ids + row).to(tl.int64)
    wanted = j < tl.where(adapter >= 0, rank, 0)
    h = tl.zeros([BLOCK_R], tl.float32)
    for part in range(parts):
        h += tl.load(partial + (part * rows + row) * BLOCK_R + j)
    place = (adapter * rank + j) * chunks + chunk
    shard = tl.load(index + place, mask=wanted, other=-1).to(tl.int64)  # [R]
    mask = (wanted & (shard >= 0))[:, None] & live[None, :]
    b = tl.load(pool + shard[:, None] * pool_row + n[None, :], mask=mask, other=0.0)  # [R, N]
    scale = tl.load(scaling + tl.maximum(adapter, 0))  # of no adapter, whose h is 0, any
    acc = tl.load(base + row * base_row + c, mask=live, other=0.0).to(tl.float32)
    acc += scale * tl.sum(h[:, None] * b.to(tl.float32), 0)
    # +epilogue: acc [row, c] mask [True, live]
    tl.store(out + row * out_row + c, acc.to(out.dtype.element_ty), mask=live)


def _rank_refusal(description: KernelDescription) -> str | None:
    allowed = (None, description.dtype, torch.float32)
    refusal = float_refusal(description)
    refusal = refusal or one_of("weight_dtype", description.weight_dtype, allowed)
    if refusal is None and not 1 <= description.head_dim <= MAX_RANK:
        return f"head_dim={description.head_dim}, allowed: a rank of 1 to {MAX_RANK}"
    return refusal


def _block_r(description: KernelDescription) -> int:
    return triton.next_power_of_2(description.head_dim)


class LoraShrink(Kernel):
    """`head_dim` is the rank, or a power of two above it; `weight_dtype` the pool's."""

    operator = "lora_shrink"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        return _rank_refusal(description) or one_of("epilogue", description.epilogue, (None,))

    def source(self, description: KernelDescription) -> str:
        """See `Kernel`."""
        sizes = ("rows", "rank", "chunks", "pieces")
        return generate(
            lora_shrink_kernel,
            description=description,
            source_url=SOURCE_URL,
            signature={
                "x": pointer(description.dtype),
                "pool": pointer(description.weight_dtype or description.dtype),
                **dict.fromkeys(("index", "adapter_ids"), pointer(torch.int32)),
                "partial": pointer(torch.float32),
                **dict.fromkeys(sizes, "i64"),
                **dict.fromkeys(("shard_width", "x_row", "pool_row"), "i64:16"),
            },
            constants={
                "BLOCK_R": _block_r(description),
                "BLOCK_K": CONFIG.block_k // max(1, _block_r(description) // 64),
                "PIECE": CONFIG.piece,
            },
            launch=Launch(("rows", "chunks * pieces"), CONFIG.num_warps, CONFIG.num_stages),
        )


class LoraExpand(Kernel):
    """`head_dim` is the rank, or a power of two above it; `weight_dtype` the pool's."""

    operator = "lora_expand"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        return _rank_refusal(description)

    def source(self, description: KernelDescription) -> str:
        """See `Kernel`."""
        epilogue = description.epilogue
        dtype = epilogue.dtype if epilogue and epilogue.dtype else description.dtype
        sizes = ("rows", "rank", "parts", "chunks", "blocks")
        return generate(
            lora_expand_kernel,
            description=description,
            source_url=SOURCE_URL,
            signature={
                **dict.fromkeys(("partial", "scaling"), pointer(torch.float32)),
                "pool": pointer(description.weight_dtype or description.dtype),
                **dict.fromkeys(("index", "adapter_ids"), pointer(torch.int32)),
                "base": pointer(description.dtype),
                "out": pointer(dtype),
                **dict.fromkeys(sizes, "i64"),
                **dict.fromkeys(("shard_width", "pool_row", "base_row", "out_row"), "i64:16"),
            },
            constants={"BLOCK_R": _block_r(description), "BLOCK_N": CONFIG.block_n},
            launch=Launch(("rows", "chunks * blocks"), CONFIG.num_warps, CONFIG.num_stages),
            epilogue=epilogue,
        )


LORA_SHRINK, LORA_EXPAND = LoraShrink(), LoraExpand()


def pack_adapters(adapters: Sequence[tuple[Tensor, Tensor, float]]) -> Adapters:
    """Dense adapters as pools of whole rows.

    Args:
        adapters: lora_a [rank, in_features], lora_b [out_features, rank] and the scaling of each;
            ranks may differ.
    """
    rank = max(a.shape[0] for a, _, _ in adapters)
    index = torch.full((len(adapters), rank, 1), -1, dtype=torch.int32)
    first = 0
    for i, (a, _, _) in enumerate(adapters):
        index[i, : a.shape[0], 0] = torch.arange(first, first + a.shape[0])
        first += a.shape[0]
    a_pool = torch.cat([a for a, _, _ in adapters])
    b_pool = torch.cat([b.T for _, b, _ in adapters]).contiguous()
    index = index.to(a_pool.device)
    scaling = torch.tensor([s for _, _, s in adapters], device=a_pool.device)
    return Adapters(a_pool, index, b_pool, index, scaling)


def lora(
    x: Tensor,
    base: Tensor,
    adapters: Adapters,
    adapter_ids: Tensor,
    *,
    epilogue: Epilogue | None = None,
    operands: Sequence[Tensor] = (),
) -> Tensor:
    """base + scaling · B A x with each row's own adapter, then the epilogue.

    Args:
        x: [rows, in_features]; base: [rows, out_features] of x's dtype.
        adapter_ids: int32 [rows], -1 = none.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    rows, in_features = rows_of("x", x)
    base_rows, out_features = rows_of("base", base)
    same_dtype("base", base, x)
    if base_rows != rows or adapter_ids.shape != (rows,) or adapter_ids.dtype != torch.int32:
        raise InputError(f"base {tuple(base.shape)} and int32 adapter_ids beside {rows} rows of x")
    rank, a_chunks = _check_pool("a", adapters.a_pool, adapters.a_index, in_features)
    b_rank, _ = _check_pool("b", adapters.b_pool, adapters.b_index, out_features)
    if b_rank != rank or adapters.a_pool.dtype != adapters.b_pool.dtype:
        raise InputError(f"b: rank {b_rank} of {adapters.b_pool.dtype} where a has {rank}")
    if adapters.scaling.dtype != torch.float32:
        raise InputError(f"scaling: {adapters.scaling.dtype}, float32 is expected")
    pool_dtype = adapters.a_pool.dtype
    description = KernelDescription(
        operator="lora_shrink",
        dtype=x.dtype,
        weight_dtype=pool_dtype if pool_dtype != x.dtype else None,
        head_dim=triton.next_power_of_2(rank),
    )
    refusal = LORA_SHRINK.supports(description)
    if refusal is not None:
        raise InputError(refusal)
    width = in_features // a_chunks
    pieces = triton.cdiv(width, CONFIG.piece)
    parts = a_chunks * pieces
    partial = x.new_empty((parts, rows, description.head_dim), dtype=torch.float32)
    pool = adapters.a_pool
    sizes = (rows, rank, a_chunks, width, pieces, x.stride(0), pool.stride(0))
    tensors = (x, pool, adapters.a_index, adapter_ids, partial)
    run(LORA_SHRINK, description, (rows, parts), (*tensors, *sizes))
    return _expand(partial, base, adapters, adapter_ids, description, epilogue, operands)


def _expand(
    partial: Tensor,
    base: Tensor,
    adapters: Adapters,
    adapter_ids: Tensor,
    shrunk: KernelDescription,
    epilogue: Epilogue | None,
    operands: Sequence[Tensor],
) -> Tensor:
    """The second kernel."""
    (rows, out_features), pool, index = base.shape, adapters.b_pool, adapters.b_index
    chunks = index.shape[2]
    width = out_features // chunks
    blocks = triton.cdiv(width, CONFIG.block_n)
    description = KernelDescription(
        operator="lora_expand",
        dtype=shrunk.dtype,
        weight_dtype=shrunk.weight_dtype,
        head_dim=shrunk.head_dim,
        epilogue=epilogue,
    )
    dtype = epilogue.dtype if epilogue and epilogue.dtype else base.dtype
    out = base.new_empty((rows, out_features), dtype=dtype)
    extra = epilogue.launch_arguments(operands, rows, out_features) if epilogue else []
    strides = (pool.stride(0), base.stride(0), out.stride(0))
    sizes = (rows, index.shape[1], partial.shape[0], chunks, width, blocks, *strides)
    tensors = (partial, pool, index, adapter_ids, adapters.scaling, base, out)
    run(LORA_EXPAND, description, (rows, chunks * blocks), (*tensors, *sizes, *extra))
    return out


def _check_pool(name: str, pool: Tensor, index: Tensor, features: int) -> tuple[int, int]:
    """Rank and number of chunks."""
    _, width = rows_of(f"{name}_pool", pool)
    if index.dim() != 3 or index.dtype != torch.int32 or not index.is_contiguous():
        raise InputError(f"{name}_index: contiguous int32 [num_adapters, rank, chunks] is expected")
    if width * index.shape[2] != features:
        told = f"{index.shape[2]} shards of {width} where {features} values are expected"
        raise InputError(f"{name}_pool: {told}")
    return index.shape[1], index.shape[2]


def lora_reference(
    x: Tensor,
    base: Tensor,
    adapters: Adapters,
    adapter_ids: Tensor,
    *,
    epilogue: Epilogue | None = None,
    operands: Sequence[Tensor] = (),
) -> Tensor:
    """The same in plain PyTorch, row by row."""

    def matrix(pool: Tensor, index: Tensor) -> Tensor:
        shards = pool[index.long().clamp(min=0)].float()
        return torch.where(index[..., None] >= 0, shards, 0.0).flatten(-2)

    out = base.float().clone()
    for row, adapter in enumerate(adapter_ids.tolist()):
        if adapter >= 0:
            a = matrix(adapters.a_pool, adapters.a_index[adapter])
            b = matrix(adapters.b_pool, adapters.b_index[adapter])
            out[row] += adapters.scaling[adapter] * (a @ x[row].float()) @ b
    out = epilogue.reference(out, operands) if epilogue else out
    return out if epilogue and epilogue.dtype else out.to(x.dtype)


def lora_cost(x: Tensor, base: Tensor, rank: int) -> Cost:
    """Each row reads its own adapter."""
    values = rank * (x.numel() + base.numel())
    moved = values * x.element_size() + 2 * base.numel() * base.element_size()
    return Cost(2.0 * values, float(moved), 2)
