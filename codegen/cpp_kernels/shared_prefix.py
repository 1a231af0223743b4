"""Decode attention of requests whose caches begin alike: their shared prefix is read once for all.

    out = merge(attention over prefix, attention over the request's own entries)

Layout: q bhsd; prefix [num_kv_heads, prefix_len, d]; suffixes bhsd. Entries are float32 or bfloat16 and
become fp32 in registers; everything else is fp32. Bytes moved: prefix once, suffixes once. The prefix is
attended by all requests' rows as if they were one request's (see `decode_attention` for how threads share
entries); the suffix's result of a row is joined with the prefix's by their log-sum-exps as it is stored.
Source: https://arxiv.org/abs/2402.05099
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace

import torch
from torch import Tensor

from codegen.cpp_kernels.arguments import Arguments
from codegen.cpp_kernels.attention_inputs import (
    AttentionInputs,
    element_type,
    refuse,
    unsupported,
    value_width,
)
from codegen.cpp_kernels.compiler import compile_library, inline_headers
from codegen.cpp_kernels.decode_attention import reference as attention_reference
from codegen.cpp_kernels.provenance import provenance
from codegen.kernel import Kernel, KernelDescription, dtype_name
from rewriter.cost.cost import Cost
from rewriter.errors import ConfigError

__all__ = ["SharedPrefix", "cost", "reference", "shared_prefix"]

_ARGUMENTS = Arguments(
    q="const float*",
    k="const Entry*",
    v="const Entry*",
    prefix_k="const Entry*",
    prefix_v="const Entry*",
    out="Element*",
    lse="float*",
    scratch="float*",
    **{
        f"{name}_{axis}": "int64_t"
        for name in ("k", "v", "prefix_k", "prefix_v")
        for axis in ("batch", "head", "entry")
    },
    batch_size="int64_t",
    num_kv_heads="int64_t",
    group_size="int64_t",
    q_len="int64_t",
    prefix_len="int64_t",
    kv_len="int64_t",
    q_positions="const int64_t*",
    q_positions_batch="int64_t",
    sinks="const float*",
    softmax_scale="float",
    softcap="float",
    threads="int",
)

_TEXT = """\
#include "parallel.h"
#include "shared_prefix.h"

typedef {element} Element;
typedef {entry} Entry;
constexpr int D = {head_dim}, DV = {value_dim};

{arguments}
extern "C" int64_t scratch_size(int64_t batch_size, int64_t kv_heads, int64_t rows, int threads) {{
    return batch_size * kv_heads * rows * (D + DV + 1) +
           rw::attention_scratch(batch_size * rows, DV, threads);
}}

extern "C" void shared_prefix(const Arguments* arguments) {{
    const Arguments& a = *arguments;
    rw::AttentionShape shape{{a.batch_size, a.num_kv_heads, a.group_size, a.q_len}};
    rw::AttentionShape folded = rw::folded_shape(shape);
    int64_t all = a.batch_size * a.num_kv_heads * shape.rows();
    float *queries = a.scratch, *values = queries + all * D, *lse = values + all * DV;
    float* parts = lse + all;

    rw::Scores in_prefix{{folded.group_size, folded.q_len, a.prefix_len}};
    in_prefix.softcap = a.softcap;
    rw::Scores in_suffix{{a.group_size, a.q_len, a.kv_len}};
    in_suffix.softcap = a.softcap, in_suffix.mask = rw::Mask::CAUSAL;
    in_suffix.q_positions = a.q_positions, in_suffix.q_batch = a.q_positions_batch;

    auto whole = [&](int64_t) {{ return rw::entries_between(0, a.prefix_len); }};
    auto own = [&](int64_t batch) {{
        int64_t last = a.kv_len;
        if (a.q_positions) {{
            last = 0;
            for (int64_t i = 0; i < a.q_len; ++i) {{
                int64_t position = a.q_positions[batch * a.q_positions_batch + i];
                last = position >= last ? position + 1 : last;
            }}
        }}
        return rw::entries_between(0, last < a.kv_len ? last : a.kv_len);
    }};
    auto store = [&](int64_t row, const float* from, float row_lse) {{
        for (int c = 0; c < DV; ++c) a.out[row * DV + c] = rw::from_float<Element>(from[c]);
        a.lse[row] = row_lse;
    }};
    rw::KeepPrefix<DV> keep{{values, lse}};
    rw::JoinPrefix<DV, decltype(store)> join{{shape, values, lse, store}};
    rw::StridedEntries<Entry> prefix{{a.prefix_k,       a.prefix_v,     0, a.prefix_k_head,
                                     a.prefix_k_entry, 0, a.prefix_v_head, a.prefix_v_entry}};
    rw::StridedEntries<Entry> suffix{{a.k,       a.v,       a.k_batch, a.k_head,
                                     a.k_entry, a.v_batch, a.v_head,  a.v_entry}};
    rw::parallel(a.threads, [&](int thread, int num_threads) {{
        rw::fold_queries<D>(shape, a.q, queries, thread, num_threads);
        rw::barrier();
        rw::decode_attention<D, DV>(folded, queries, prefix, whole, in_prefix, a.softmax_scale, nullptr,
                                    parts, keep, thread, num_threads);
        rw::barrier();
        rw::decode_attention_merge<DV>(folded, whole, nullptr, parts, keep, thread, num_threads);
        rw::barrier();
        rw::decode_attention<D, DV>(shape, a.q, suffix, own, in_suffix, a.softmax_scale, a.sinks, parts,
                                    join, thread, num_threads);
        rw::barrier();
        rw::decode_attention_merge<DV>(shape, own, a.sinks, parts, join, thread, num_threads);
    }});
}}
"""


class SharedPrefix(Kernel):
    """All see the whole prefix, and of their own entries those up to their position."""

    operator = "shared_prefix"
    backend = "cpu"

    def supports(self, description: KernelDescription) -> str | None:
        """A reason for other dtypes, layouts or masks; None otherwise."""
        if description.layout != "bhsd":
            return f"layout={description.layout!r}: bhsd"
        if description.mask not in ("full", "causal"):
            return f"mask={description.mask!r}: causal"
        return unsupported(description)

    def source(self, description: KernelDescription) -> str:
        """C++ text with the entry points `shared_prefix` and `scratch_size`."""
        refusal = self.supports(description)
        if refusal is not None:
            raise ConfigError("description", str(description), refusal)
        text = _TEXT.format(
            element=element_type(description.dtype),
            entry=element_type(description.weight_dtype or description.dtype),
            head_dim=description.head_dim,
            value_dim=value_width(description),
            arguments=_ARGUMENTS.text,
        )
        url = "https://arxiv.org/abs/2402.05099"
        name = "codegen.cpp_kernels.shared_prefix"
        return provenance(_compiled_for(description), name, url, inline_headers(text))


def shared_prefix(
    description: KernelDescription,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None = None,
    *,
    softmax_scale: float,
    sinks: Tensor | None = None,
    threads: int | None = None,
    isa: str = "native",
) -> tuple[Tensor, Tensor]:
    """Causal attention of each request over prefix and own entries.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim] in the description's dtype.
        prefix_k, prefix_v: [num_kv_heads, prefix_len, head_dim or value_dim] in its weight_dtype.
        k, v: bhsd [batch_size, num_kv_heads, capacity, ..], own entries.
        q_positions: int64 [batch_size, q_len], positions behind the prefix, so that own entries up to
            them are seen; -1 sees the prefix alone. None = the last q_len of the capacity.
        sinks: [num_heads] logits in the denominator.
        threads: torch's number of threads unless given. isa: a key of `compiler.ISAS`.

    Returns:
        out [batch_size, num_heads, q_len, value_dim] in q's dtype, and lse fp32 without the last
        dimension.

    Raises:
        InputError: a tensor of another shape, dtype or device. ConfigError: see `supports`.
    """
    function, scratch_size = _entry(_compiled_for(description), isa)
    inputs = AttentionInputs(description, q, k, v, None, None)
    prefix_len = prefix_k.shape[1] if prefix_k.dim() == 3 else 0
    for name, tensor, like in (("prefix_k", prefix_k, k), ("prefix_v", prefix_v, v)):
        wanted = (k.shape[1], prefix_len, like.shape[3])
        if tensor.shape != wanted or tensor.dtype != like.dtype or tensor.device.type != "cpu":
            refuse(name, tensor, f"{wanted} of {dtype_name(like.dtype)} on the CPU")
    prefix = [t if t.stride(2) == 1 else t.contiguous() for t in (prefix_k, prefix_v)]
    threads = threads or torch.get_num_threads()
    out = q.new_empty((*q.shape[:3], value_width(description)))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    rows = inputs.group_size * q.shape[2]
    values = {
        **inputs.cache(),
        **inputs.positions(q_positions, None, None, None),
        **inputs.score_terms(None, sinks, None),
    }
    values.pop("page_size")
    _ARGUMENTS.call(
        function,
        prefix_k=prefix[0],
        prefix_v=prefix[1],
        prefix_k_head=prefix[0].stride(0),
        prefix_k_entry=prefix[0].stride(1),
        prefix_v_head=prefix[1].stride(0),
        prefix_v_entry=prefix[1].stride(1),
        prefix_len=prefix_len,
        out=out,
        lse=lse,
        scratch=lse.new_empty(scratch_size(q.shape[0], k.shape[1], rows, threads)),
        softmax_scale=softmax_scale,
        softcap=description.softcap,
        threads=threads,
        **values,
    )
    return out, lse


def reference(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    *,
    softmax_scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What the kernel means: every request with a copy of the prefix."""
    prefix_len = prefix_k.shape[1]
    k = torch.cat((prefix_k.expand(q.shape[0], -1, -1, -1), k), 2)
    v = torch.cat((prefix_v.expand(q.shape[0], -1, -1, -1), v), 2)
    entries = torch.arange(k.shape[2]).unsqueeze(0)
    options = {"softmax_scale": softmax_scale, "mask": "causal", "softcap": softcap}
    at = q_positions + prefix_len
    return attention_reference(q, k, v, at, entries, None, sinks, **options)


def cost(
    description: KernelDescription, batch_size: int, num_heads: int, prefix_len: int, kv_len: int
) -> Cost:
    """Of one new token for each request; the prefix read once, kv_len own entries each."""
    width = description.head_dim + value_width(description)
    entry = (description.weight_dtype or description.dtype).itemsize
    entries = num_heads // description.group_size * (prefix_len + batch_size * kv_len)
    flops = 2.0 * batch_size * num_heads * (prefix_len + kv_len) * width
    rows = batch_size * num_heads * width * description.dtype.itemsize
    return Cost(flops, float(width * entry * entries + rows), 1)


def _compiled_for(description: KernelDescription) -> KernelDescription:
    """Without what is an argument."""
    return replace(description, mask="causal", softcap=0.0, group_size=1)


@functools.cache
def _entry(
    description: KernelDescription, isa: str
) -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    library = compile_library(SharedPrefix().source(description), isa=isa)
    library.shared_prefix.argtypes = [ctypes.c_void_p]
    library.shared_prefix.restype = None
    library.scratch_size.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int]
    library.scratch_size.restype = ctypes.c_int64
    return library.shared_prefix, library.scratch_size
