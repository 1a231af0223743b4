"""Rotary embedding of new queries and keys, and their way into the cache, in one pass.

    (a, b) -> (a cos - b sin, b cos + a sin) on the first `width` numbers of q and k
    k_cache[b, h, slot(b, i)] = turned k[b, h, i],   v_cache[b, h, slot(b, i)] = v[b, h, i]

Layout: q, k, v and the caches bhsd with any strides but the last dimension's; cos and sin fp32, [batch_size
or 1, q_len, width / 2]. In fp32, rounded once to the cache's dtype. Bytes moved: the new rows once in, once
out. One thread computes whole rows of one head and token. Source: https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace

import torch
from torch import Tensor

from codegen.cpp_kernels.arguments import Arguments
from codegen.cpp_kernels.attention_inputs import element_type, refuse
from codegen.cpp_kernels.compiler import compile_library, inline_headers
from codegen.cpp_kernels.provenance import provenance
from codegen.kernel import Kernel, KernelDescription, dtype_name
from rewriter.cost.cost import Cost
from rewriter.dialect.rope import rope
from rewriter.errors import ConfigError, InputError

__all__ = ["RotaryAppend", "cost", "reference", "rotary_append"]

_ROWS = ("q", "k", "v", "q_out", "k_cache", "v_cache")
_ARGUMENTS = Arguments(
    q="const Element*",
    k="const Element*",
    v="const Element*",
    q_out="Element*",
    k_cache="Entry*",
    v_cache="Entry*",
    **{f"{name}_{axis}": "int64_t" for name in _ROWS for axis in ("batch", "head", "row")},
    cos="const float*",
    sin="const float*",
    table_batch="int64_t",
    table_row="int64_t",
    slots="const int64_t*",
    slots_batch="int64_t",
    offset="int64_t",
    batch_size="int64_t",
    num_heads="int64_t",
    num_kv_heads="int64_t",
    q_len="int64_t",
    head_dim="int64_t",
    value_dim="int64_t",
    width="int64_t",
    threads="int",
)

_TEXT = """\
#include "parallel.h"
#include "rotary_append.h"

typedef {element} Element;
typedef {entry} Entry;

{arguments}
extern "C" void rotary_append(const Arguments* arguments) {{
    const Arguments& a = *arguments;
    rw::RotaryShape shape{{a.batch_size, a.num_heads, a.num_kv_heads, a.q_len, a.head_dim,
                          a.value_dim, a.width, {interleaved}, a.table_batch, a.table_row}};
    auto slot = [&](int64_t b, int64_t i) {{
        return a.slots ? a.slots[b * a.slots_batch + i] : a.offset + i;
    }};
    rw::NewRows<const Element> q{{a.q, a.q_batch, a.q_head, a.q_row}};
    rw::NewRows<const Element> k{{a.k, a.k_batch, a.k_head, a.k_row}};
    rw::NewRows<const Element> v{{a.v, a.v_batch, a.v_head, a.v_row}};
    rw::NewRows<Element> q_out{{a.q_out, a.q_out_batch, a.q_out_head, a.q_out_row}};
    rw::CacheRows<Entry> k_cache{{a.k_cache, a.k_cache_batch, a.k_cache_head, a.k_cache_row}};
    rw::CacheRows<Entry> v_cache{{a.v_cache, a.v_cache_batch, a.v_cache_head, a.v_cache_row}};
    rw::parallel(a.threads, [&](int thread, int num_threads) {{
        rw::rotary_append(shape, q, k, v, a.cos, a.sin, q_out, k_cache, v_cache, slot, thread,
                          num_threads);
    }});
}}
"""


class RotaryAppend(Kernel):
    """`form` is `"half"`, pairs (i, i + width / 2), or `"interleaved"`, pairs (2i, 2i + 1)."""

    operator = "rotary_append"
    backend = "cpu"

    def supports(self, description: KernelDescription) -> str | None:
        """A reason for other dtypes or forms; None otherwise."""
        d = description
        for field, dtype in (("dtype", d.dtype), ("weight_dtype", d.weight_dtype)):
            if dtype not in (None, torch.float32, torch.bfloat16):
                return f"{field}={dtype_name(dtype)}: float32 or bfloat16"
        if d.form not in ("half", "interleaved"):
            return f'form={d.form!r}: "half" or "interleaved"'
        return "epilogue: none" if d.epilogue is not None else None

    def source(self, description: KernelDescription) -> str:
        """C++ text with the entry point `rotary_append`; ConfigError where it is not supported."""
        refusal = self.supports(description)
        if refusal is not None:
            raise ConfigError("description", str(description), refusal)
        text = _TEXT.format(
            element=element_type(description.dtype),
            entry=element_type(description.weight_dtype or description.dtype),
            arguments=_ARGUMENTS.text,
            interleaved="true" if description.form == "interleaved" else "false",
        )
        url = "https://arxiv.org/abs/2104.09864"
        name = "codegen.cpp_kernels.rotary_append"
        return provenance(description, name, url, inline_headers(text))


def rotary_append(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    offset: int = 0,
    slots: Tensor | None = None,
    threads: int | None = None,
    isa: str = "native",
) -> Tensor:
    """Store the turned keys and the values; give the turned queries.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim]; k, v: with num_kv_heads, v of its own width.
        k_cache, v_cache: bhsd [batch_size, num_kv_heads, capacity, ..] in weight_dtype; mutated.
        cos, sin: fp32 [batch_size or 1, q_len, width / 2]; width 0 turns nothing.
        offset: the first new entry's place in the cache, unless `slots` tells.
        slots: int64 [batch_size, q_len], the place of each; different ones within a row of the batch.
        threads: torch's number of threads unless given. isa: a key of `compiler.ISAS`.

    Returns:
        Contiguous queries like q.

    Raises:
        InputError: a tensor of another shape, dtype or device; entries beyond the capacity.
    """
    cos, sin, width = _checked(description, q, k, v, k_cache, v_cache, cos, sin)
    batch_size, num_heads, q_len, head_dim = q.shape
    last = offset + q_len - 1 if slots is None else int(slots.max()) if slots.numel() else 0
    first = offset if slots is None else int(slots.min()) if slots.numel() else 0
    if q_len and not 0 <= first <= last < k_cache.shape[2]:
        raise InputError(f"entries {first} to {last} are not allowed: below {k_cache.shape[2]}")
    if slots is not None and (slots.dtype != torch.int64 or slots.shape != (batch_size, q_len)):
        refuse("slots", slots, f"int64 [{batch_size}, {q_len}]")
    slots = None if slots is None else slots.contiguous()
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows = dict(zip(_ROWS, (q, k, v, q_out, k_cache, v_cache), strict=True))
    strides = {
        f"{name}_{axis}": tensor.stride(n)
        for name, tensor in rows.items()
        for n, axis in enumerate(("batch", "head", "row"))
    }
    compiled = replace(description, head_dim=0, value_dim=0, group_size=1)
    _ARGUMENTS.call(
        _entry(compiled, isa),
        **rows,
        **strides,
        cos=cos,
        sin=sin,
        table_batch=cos.stride(0),
        table_row=cos.stride(1),
        slots=slots,
        slots_batch=q_len,
        offset=offset,
        batch_size=batch_size,
        num_heads=num_heads,
        num_kv_heads=k.shape[1],
        q_len=q_len,
        head_dim=head_dim,
        value_dim=v.shape[3],
        width=width,
        threads=threads or torch.get_num_threads(),
    )
    return q_out


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    *,
    interleaved: bool,
) -> Tensor:
    """What the kernel means, as the dialect's operators compute it; mutates the caches."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = rope.reference(k.float(), cos, sin, interleaved=interleaved)
    for cache, new in ((k_cache, turned), (v_cache, v)):
        at = slots[:, None, :, None].expand(new.shape)
        cache.scatter_(2, at, new.to(cache.dtype))
    return rope.reference(q.float(), cos, sin, interleaved=interleaved).to(q.dtype)


def cost(q: Tensor, k: Tensor, v: Tensor) -> Cost:
    """New rows read and written."""
    moved = 2 * sum(t.numel() * t.element_size() for t in (q, k, v))
    return Cost(3.0 * (q.numel() + k.numel()), float(moved), 1)


def _checked(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, int]:
    """Tables [batch_size, q_len, width / 2] by strides, and the width."""
    d, entry = description, description.weight_dtype or description.dtype
    batch_size, _, q_len, head_dim = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    capacity = k_cache.shape[2]
    wanted = (
        ("q", q, d.dtype, (batch_size, q.shape[1], q_len, head_dim)),
        ("k", k, d.dtype, (batch_size, kv_heads, q_len, head_dim)),
        ("v", v, d.dtype, (batch_size, kv_heads, q_len, value_dim)),
        ("k_cache", k_cache, entry, (batch_size, kv_heads, capacity, head_dim)),
        ("v_cache", v_cache, entry, (batch_size, kv_heads, capacity, value_dim)),
    )
    for name, tensor, dtype, shape in wanted:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
            refuse(name, tensor, f"{shape} of {dtype_name(dtype)} on the CPU")
        if name.endswith("cache") and tensor.stride(3) != 1:
            refuse(name, tensor, "a last dimension that is contiguous")
    width = 2 * cos.shape[-1]
    if cos.shape != sin.shape or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        refuse("cos", cos, "fp32, like sin")
    if cos.dim() != 3 or cos.shape[0] not in (1, batch_size) or cos.shape[1] != q_len:
        refuse("cos", cos, f"[{batch_size} or 1, {q_len}, width / 2]")
    if width > head_dim:
        refuse("cos", cos, f"at most {head_dim // 2} numbers in a row")
    cos, sin = (t.contiguous().expand(batch_size, q_len, width // 2) for t in (cos, sin))
    return cos, sin, width


@functools.cache
def _entry(description: KernelDescription, isa: str) -> ctypes._NamedFuncPointer:
    library = compile_library(RotaryAppend().source(description), isa=isa)
    library.rotary_append.argtypes = [ctypes.c_void_p]
    library.rotary_append.restype = None
    return library.rotary_append
