"""Rotate the queries and keys of new tokens and append keys and values to a cache, in one launch.

    first', second' = first · cos - second · sin, second · cos + first · sin

Pairs are (2i, 2i + 1) where interleaved, (i, i + rotary_dim / 2) otherwise; dimensions from rotary_dim
on pass through. Layouts: q bhsd [batch_size, num_heads, q_len, head_dim]; k, v and the caches the same
with num_kv_heads and, for the caches, capacity entries; any strides, the last dimension contiguous.
cos and sin [batch_size or 1, q_len, rotary_dim / 2], of one dtype. Entry offset + t of the caches
becomes token t's, rounded to the caches' dtype. One program takes one token of one head: the first
num_heads rotate queries, the others rotate and append a key and append a value. Arithmetic is fp32.
Bytes moved: q twice, k and v twice, the tables once (then from the cache).
Source: https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels.checks import FLOATS, float_refusal, one_of, same_dtype
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from rewriter.cost.cost import Cost
from rewriter.errors import InputError

__all__ = [
    "ROTARY_APPEND",
    "rotary_append",
    "rotary_append_cost",
    "rotary_append_reference",
]

MAX_HEAD_DIM = 512


@dataclass(frozen=True)
class RotaryConfig:
    """Warps of a program, which has one head of one token."""

    num_warps: int = 1


CONFIG = RotaryConfig()
"""A head of 128 is four values for each thread of one warp; not timed."""


@triton.jit
def rotate(
    source: tl.tensor,
    target: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """One head at `source`, rotated, to `target`; cos and sin point at the token's rows."""
    d = tl.arange(0, BLOCK_D)  # [D]
    live = d < HEAD_DIM
    turns = d < ROTARY_DIM
    HALF: tl.constexpr = ROTARY_DIM // 2
    if INTERLEAVED:
        pair = d // 2
        is_first = d % 2 == 0
        other = tl.where(is_first, d + 1, d - 1)
    else:
        pair = d % HALF
        is_first = d < HALF
        other = tl.where(is_first, d + HALF, d - HALF)
    own = tl.load(source + d, mask=live, other=0.0).to(tl.float32)
    partner = tl.load(source + other, mask=turns, other=0.0).to(tl.float32)
    c = tl.load(cos + pair, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + pair, mask=turns, other=0.0).to(tl.float32)
    turned = own * c + tl.where(is_first, -partner, partner) * s
    tl.store(target + d, tl.where(turns, turned, own).to(target.dtype.element_ty), mask=live)


@triton.jit
def rotary_append_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_out: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    offset: int,
    q_len: int,
    num_heads: int,
    q_batch: int,
    q_head: int,
    q_row: int,
    k_batch: int,
    k_head: int,
    k_row: int,
    v_batch: int,
    v_head: int,
    v_row: int,
    table_batch: int,
    table_row: int,
    out_batch: int,
    out_head: int,
    out_row: int,
    kc_batch: int,
    kc_head: int,
    kc_row: int,
    vc_batch: int,
    vc_head: int,
    vc_row: int,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """See the module."""
    b = tl.program_id(0).to(tl.int64) // q_len
    t = tl.program_id(0).to(tl.int64) % q_len
    h = tl.program_id(1).to(tl.int64)
    table = b * table_batch + t * table_row
    if h < num_heads:
        source = q + b * q_batch + h * q_head + t * q_row
        target = q_out + b * out_batch + h * out_head + t * out_row
        rotate(source, target, cos + table, sin + table, HEAD_DIM, ROTARY_DIM, BLOCK_D, INTERLEAVED)
    else:
        h -= num_heads
        source = k + b * k_batch + h * k_head + t * k_row
        target = k_cache + b * kc_batch + h * kc_head + (offset + t) * kc_row
        rotate(source, target, cos + table, sin + table, HEAD_DIM, ROTARY_DIM, BLOCK_D, INTERLEAVED)
        c = tl.arange(0, BLOCK_V)  # [V]
        live = c < VALUE_DIM
        value = tl.load(v + b * v_batch + h * v_head + t * v_row + c, mask=live, other=0.0)
        place = v_cache + b * vc_batch + h * vc_head + (offset + t) * vc_row + c
        tl.store(place, value.to(v_cache.dtype.element_ty), mask=live)


class RotaryAppend(Kernel):
    """`form` is `"interleaved"` or `"halves"`, `span` the rotary_dim, `weight_dtype` the caches'.

    Compiled ahead of time, the tables are fp32.
    """

    operator = "rotary_append"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        refusal = float_refusal(description)
        refusal = refusal or one_of("form", description.form, ("interleaved", "halves"))
        refusal = refusal or one_of("weight_dtype", description.weight_dtype, (None, *FLOATS))
        if refusal is None and not 1 <= description.head_dim <= MAX_HEAD_DIM:
            return f"head_dim={description.head_dim}, allowed: 1 to {MAX_HEAD_DIM}"
        span = description.span
        if refusal is None and (span % 2 or not 2 <= span <= description.head_dim):
            return (
                f"span={span}, allowed: an even rotary_dim of 2 to head_dim={description.head_dim}"
            )
        return refusal or one_of("epilogue", description.epilogue, (None,))

    def source(self, description: KernelDescription) -> str:
        """See `Kernel`."""
        wide, cache = description.dtype, description.weight_dtype or description.dtype
        value_dim = description.value_dim or description.head_dim
        strides = [
            f"{name}_{part}"
            for name in ("q", "k", "v", "out", "kc", "vc")
            for part in ("batch", "head", "row")
        ]
        aligned = "i64:16" if description.head_dim % 16 == value_dim % 16 == 0 else "i64"
        return generate(
            rotary_append_kernel,
            description=description,
            source_url="https://arxiv.org/abs/2104.09864",
            signature={
                **dict.fromkeys(("q", "k", "v", "q_out"), pointer(wide)),
                **dict.fromkeys(("cos", "sin"), pointer(torch.float32)),
                **dict.fromkeys(("k_cache", "v_cache"), pointer(cache)),
                **dict.fromkeys(("offset", "q_len", "num_heads"), "i64"),
                **dict.fromkeys(("table_batch", "table_row"), "i64"),
                **dict.fromkeys(strides, aligned),
            },
            constants={
                "HEAD_DIM": description.head_dim,
                "VALUE_DIM": value_dim,
                "ROTARY_DIM": description.span,
                "BLOCK_D": triton.next_power_of_2(description.head_dim),
                "BLOCK_V": triton.next_power_of_2(value_dim),
                "INTERLEAVED": description.form == "interleaved",
            },
            launch=Launch(("batch_size * q_len", "num_heads + num_kv_heads"), CONFIG.num_warps, 1),
        )


ROTARY_APPEND = RotaryAppend()


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offset: int,
    *,
    interleaved: bool,
) -> Tensor:
    """Rotated queries; entries offset .. offset + q_len of the caches are written.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim].
        k, v: bhsd [batch_size, num_kv_heads, q_len, head_dim or value_dim] of q's dtype.
        cos, sin: [batch_size or 1, q_len, rotary_dim / 2].
        k_cache, v_cache: [batch_size, num_kv_heads, capacity, ...], mutated.

    Raises:
        InputError: shapes or dtypes that do not fit, or an offset beyond the capacity.
    """
    batch_size, num_heads, q_len, head_dim = q.shape
    num_kv_heads = k.shape[1]
    for name, tensor in (("k", k), ("v", v)):
        same_dtype(name, tensor, q)
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch_size or k.shape[2] != q_len:
        raise InputError(f"k {tuple(k.shape)}, v {tuple(v.shape)} beside q {tuple(q.shape)}")
    capacity = k_cache.shape[2]
    for name, cache, new in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        same_dtype(name, cache, k_cache)
        if cache.shape != (batch_size, num_kv_heads, capacity, new.shape[3]):
            raise InputError(f"{name}: {tuple(cache.shape)} for entries of {tuple(new.shape)}")
    if not 0 <= offset <= capacity - q_len:
        raise InputError(f"offset: {offset} + {q_len} entries in a capacity of {capacity}")
    if cos.shape != sin.shape or cos.shape[:2] not in ((1, q_len), (batch_size, q_len)):
        raise InputError(f"cos: {tuple(cos.shape)}, expected [{batch_size} or 1, {q_len}, pairs]")
    if any(t.stride(3) != 1 for t in (q, k, v, k_cache, v_cache) if t.shape[3] > 1):
        raise InputError("the last dimension of q, k, v and the caches has to be contiguous")
    cos, sin = cos.contiguous(), sin.contiguous()
    description = KernelDescription(
        operator="rotary_append",
        dtype=q.dtype,
        weight_dtype=k_cache.dtype if k_cache.dtype != q.dtype else None,
        head_dim=head_dim,
        value_dim=v.shape[3],
        span=2 * cos.shape[2],
        form="interleaved" if interleaved else "halves",
    )
    refusal = ROTARY_APPEND.supports(description)
    if refusal is not None:
        raise InputError(refusal)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tables = (0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1))
    strides = [t.stride()[:3] for t in (q, k, v)], [t.stride()[:3] for t in (out, k_cache, v_cache)]
    flat = [*(s for t in strides[0] for s in t), *tables, *(s for t in strides[1] for s in t)]
    tensors = (q, k, v, cos, sin, out, k_cache, v_cache)
    grid = (batch_size * q_len, num_heads + num_kv_heads)
    run(ROTARY_APPEND, description, grid, (*tensors, offset, q_len, num_heads, *flat))
    return out


def rotary_append_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offset: int,
    *,
    interleaved: bool,
) -> Tensor:
    """The same in plain PyTorch, caches mutated too."""
    c, s = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    half = cos.shape[-1]

    def rotated(x: Tensor) -> Tensor:
        turning, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
        pairs = turning.unflatten(-1, (half, 2) if interleaved else (2, half))
        first, second = pairs.unbind(-1 if interleaved else -2)
        turned = (first * c - second * s, second * c + first * s)
        joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        return torch.cat((joined.to(x.dtype), rest), -1)

    k_cache[:, :, offset : offset + k.shape[2]] = rotated(k).to(k_cache.dtype)
    v_cache[:, :, offset : offset + v.shape[2]] = v.to(v_cache.dtype)
    return rotated(q)


def rotary_append_cost(q: Tensor, k: Tensor, v: Tensor) -> Cost:
    """Reads and writes of q, k and v."""
    moved = 2.0 * sum(t.numel() * t.element_size() for t in (q, k, v))
    return Cost(3.0 * (q.numel() + k.numel()), moved, 1)
