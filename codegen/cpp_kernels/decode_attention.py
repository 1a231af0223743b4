"""Attention of one or a few new tokens over cached entries, each of which is read once.

    out = softmax(softcap(q kᵀ · softmax_scale) + bias + slopes · (j - i), masked) v
    lse = log Σ exp(the same scores), a sink's logit included

Layouts: q bhsd; the cache `bhsd` or `slots` [batch_size, num_kv_heads, capacity, d] with any strides but
head_dim's, or `paged` [num_pages, num_kv_heads, page_size, d]. Entries are float32 or bfloat16 and become
fp32 in registers; scores, softmax and sums are fp32. Bytes moved: keys and values of the entries that some
query may see, once. One thread computes an even share of the blocks of 64 entries of all (batch, KV head);
what two threads had of one KV head is merged behind a barrier.

Without positions only the entries within a window are read. Mask, span and softcap are arguments: one text
serves them all. Source: https://arxiv.org/abs/1805.02867, https://arxiv.org/abs/2205.14135
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
    unsupported,
    value_width,
)
from codegen.cpp_kernels.compiler import compile_library, inline_headers
from codegen.cpp_kernels.provenance import provenance
from codegen.kernel import Kernel, KernelDescription
from rewriter.cost.cost import Cost
from rewriter.dialect.attention import MASKS, attend, position_grid, repeat_kv, visible
from rewriter.errors import ConfigError

__all__ = ["DecodeAttention", "cost", "decode_attention", "reference"]

_ARGUMENTS = Arguments(
    q="const float*",
    k="const Entry*",
    v="const Entry*",
    out="Element*",
    lse="float*",
    scratch="float*",
    batch_size="int64_t",
    num_kv_heads="int64_t",
    group_size="int64_t",
    q_len="int64_t",
    kv_len="int64_t",
    k_batch="int64_t",
    k_head="int64_t",
    k_entry="int64_t",
    v_batch="int64_t",
    v_head="int64_t",
    v_entry="int64_t",
    kv_lens="const int64_t*",
    index="const int64_t*",
    index_batch="int64_t",
    index_head="int64_t",
    page_size="int64_t",
    q_positions="const int64_t*",
    q_positions_batch="int64_t",
    k_positions="const int64_t*",
    k_positions_batch="int64_t",
    k_positions_head="int64_t",
    distance="const int64_t*",
    distance_batch="int64_t",
    distance_row="int64_t",
    bias="const float*",
    bias_batch="int64_t",
    bias_head="int64_t",
    bias_row="int64_t",
    bias_entry="int64_t",
    seen="const bool*",
    seen_batch="int64_t",
    seen_head="int64_t",
    seen_row="int64_t",
    seen_entry="int64_t",
    slopes="const float*",
    sinks="const float*",
    cos="const float*",
    sin="const float*",
    table_batch="int64_t",
    table_head="int64_t",
    table_entry="int64_t",
    rotary_width="int64_t",
    interleaved="bool",
    softmax_scale="float",
    softcap="float",
    mask="int",
    span="int64_t",
    num_sink_tokens="int64_t",
    threads="int",
)

_TEXT = """\
#include "decode_attention.h"
#include "parallel.h"
#include "rotated_entries.h"

typedef {element} Element;
typedef {entry} Entry;
constexpr int D = {head_dim}, DV = {value_dim};

{arguments}
extern "C" int64_t scratch_size(int64_t rows, int threads) {{
    return rw::attention_scratch(rows, DV, threads) + int64_t(threads) * rw::KV_BLOCK * D;
}}

extern "C" void decode_attention(const Arguments* arguments) {{
    const Arguments& a = *arguments;
    rw::AttentionShape shape{{a.batch_size, a.num_kv_heads, a.group_size, a.q_len}};
    rw::Mask mask = rw::Mask(a.mask);
    rw::Scores scores{{a.group_size, a.q_len, a.kv_len}};
    // One new token behind contiguous entries sees exactly those that are read.
    bool somewhere = a.q_positions || a.k_positions || a.distance;
    scores.mask = a.q_len == 1 && !somewhere ? rw::Mask::FULL : mask;
    scores.span = a.span, scores.num_sink_tokens = a.num_sink_tokens, scores.softcap = a.softcap;
    scores.q_positions = a.q_positions, scores.q_batch = a.q_positions_batch;
    scores.k_positions = a.k_positions, scores.k_batch = a.k_positions_batch;
    scores.k_head = a.k_positions_head;
    scores.distance = a.distance, scores.distance_batch = a.distance_batch;
    scores.distance_row = a.distance_row;
    scores.bias = a.bias, scores.bias_batch = a.bias_batch, scores.bias_head = a.bias_head;
    scores.bias_row = a.bias_row, scores.bias_entry = a.bias_entry;
    scores.seen = a.seen, scores.seen_batch = a.seen_batch, scores.seen_head = a.seen_head;
    scores.seen_row = a.seen_row, scores.seen_entry = a.seen_entry;
    scores.slopes = a.slopes;
    auto visible = [&](int64_t batch) {{
        int64_t kv_len = a.kv_lens ? a.kv_lens[batch] : a.kv_len;
        if (somewhere) return rw::entries_between(0, kv_len);
        return rw::visible_spans(mask, a.span, a.num_sink_tokens, a.q_len, kv_len);
    }};
    auto out = [&](int64_t row, const float* values, float lse) {{
        for (int c = 0; c < DV; ++c) a.out[row * DV + c] = rw::from_float<Element>(values[c]);
        a.lse[row] = lse;
    }};
    rw::{kind}<Entry> cached{{a.k,       a.v,      a.k_batch, a.k_head,
                                       a.k_entry, a.v_batch, a.v_head,  a.v_entry{table}}};
    auto run = [&](auto entries) {{
        rw::parallel(a.threads, [&](int thread, int num_threads) {{
            rw::decode_attention<D, DV>(shape, a.q, entries, visible, scores, a.softmax_scale, a.sinks,
                                        a.scratch, out, thread, num_threads);
            rw::barrier();
            rw::decode_attention_merge<DV>(shape, visible, a.sinks, a.scratch, out, thread, num_threads);
        }});
    }};
{run}}}
"""
_GATHERED = """\
    rw::GatheredEntries<decltype(cached)> chosen{cached, a.index, a.index_batch, a.index_head};
"""
_ROTATED = """\
    float* turned = a.scratch + rw::attention_scratch(shape.rows(), DV, a.threads);
    run(rw::RotatedEntries<D, decltype({of})>{{{of}, a.cos, a.sin, a.table_batch, a.table_head,
                                               a.table_entry, a.rotary_width, a.interleaved, turned}});
"""


class DecodeAttention(Kernel):
    """`form`: any of `"chosen"` (entries by an index) and `"rotary"` (keys turned as they are read)."""

    operator = "decode_attention"
    backend = "cpu"

    def supports(self, description: KernelDescription) -> str | None:
        """A reason for other dtypes, layouts, masks or forms; None otherwise."""
        if description.form not in ("", "chosen", "rotary", "chosen+rotary"):
            return f'form={description.form!r}: "", "chosen", "rotary" or "chosen+rotary"'
        if description.layout == "paged" and description.form.startswith("chosen"):
            return f"form={description.form!r}: not with pages, whose table chooses already"
        return unsupported(description)

    def source(self, description: KernelDescription) -> str:
        """C++ text with the entry points `decode_attention` and `scratch_size`."""
        refusal = self.supports(description)
        if refusal is not None:
            raise ConfigError("description", str(description), refusal)
        paged, chosen = description.layout == "paged", description.form.startswith("chosen")
        of = "chosen" if chosen else "cached"
        run = _ROTATED.format(of=of) if description.form.endswith("rotary") else f"    run({of});\n"
        text = _TEXT.format(
            element=element_type(description.dtype),
            entry=element_type(description.weight_dtype or description.dtype),
            head_dim=description.head_dim,
            value_dim=value_width(description),
            arguments=_ARGUMENTS.text,
            kind="PagedEntries" if paged else "StridedEntries",
            table=", a.index, a.index_batch, a.page_size" if paged else "",
            run=(_GATHERED if chosen else "") + run,
        )
        url = "https://arxiv.org/abs/2205.14135"
        return provenance(
            _compiled_for(description),
            "codegen.cpp_kernels.decode_attention",
            url,
            inline_headers(text),
        )


def decode_attention(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None = None,
    *,
    softmax_scale: float,
    k_positions: Tensor | None = None,
    kv_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    index: Tensor | None = None,
    distance: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    threads: int | None = None,
    isa: str = "native",
) -> tuple[Tensor, Tensor]:
    """Attention of q over cached entries, with the mask, span and softcap of the description.

    Args:
        q: [batch_size, num_heads, q_len, head_dim] in the description's dtype.
        k, v: the cache, in its layout and weight_dtype; v of width value_dim.
        q_positions: int64 [batch_size, q_len], -1 = padding; None = the last q_len of the entries.
        k_positions: int64 [batch_size or 1, capacity] or [.., 1 or num_kv_heads, capacity], -1 =
            empty; None = an entry's number.
        kv_lens: int64 [batch_size], entries in use, with q_positions; None = the capacity.
        block_table: int64 [batch_size, pages], of `paged`.
        index: int64 [batch_size, 1 or num_kv_heads, chosen], of form `chosen`: the entries to attend;
            everything else counts in them.
        distance: int64 [batch_size, q_len, entries], i - j, where positions do not tell it.
        bias: float or bool (True = visible), broadcasts to [batch_size, num_heads, q_len, entries].
        sinks, slopes: [num_heads], as in `rewriter::attention`.
        rotary: cos and sin, fp32 [batch_size or 1, entries, width / 2], of form `rotary`.
        threads: torch's number of threads unless given. isa: a key of `compiler.ISAS`.

    Returns:
        out [batch_size, num_heads, q_len, value_dim] in q's dtype, and lse fp32 without the last
        dimension. Rows that see nothing are zero, with an lse of -inf.

    Raises:
        InputError: a tensor of another shape, dtype or device. ConfigError: see `supports`.
    """
    inputs = AttentionInputs(description, q, k, v, block_table, index)
    function, scratch_size = _entry(_compiled_for(description), isa)
    threads = threads or torch.get_num_threads()
    out = q.new_empty((*q.shape[:3], value_width(description)))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    scratch = lse.new_empty(scratch_size(inputs.group_size * q.shape[2], threads))
    values = {
        **inputs.cache(),
        **inputs.positions(q_positions, k_positions, kv_lens, distance),
        **inputs.score_terms(bias, sinks, slopes),
        **inputs.tables(rotary),
    }
    _ARGUMENTS.call(
        function,
        out=out,
        lse=lse,
        scratch=scratch,
        interleaved=interleaved,
        softmax_scale=softmax_scale,
        softcap=description.softcap,
        mask=(*MASKS, "sinks_window").index(description.mask),
        span=description.span,
        num_sink_tokens=description.num_sink_tokens,
        threads=threads,
        **values,
    )
    return out, lse


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    softmax_scale: float,
    mask: str,
    span: int = 0,
    softcap: float = 0.0,
    num_sink_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """What the kernel means, in fp32, on entries `bhsd` or `slots`."""
    q, k, v = q.float(), repeat_kv(k.float(), q.shape[1]), repeat_kv(v.float(), q.shape[1])
    at, entries = (p.unsqueeze(1) for p in position_grid(q, k, q_positions, k_positions))
    keep = visible(at, entries, "sliding_window" if mask == "sinks_window" else mask, span)
    if mask == "sinks_window":
        keep |= visible(at, entries, "causal", 0) & (entries < num_sink_tokens).unsqueeze(-2)
    if bias is not None and bias.dtype == torch.bool:
        keep, bias = keep & bias, None
    if slopes is not None:
        alibi = slopes.view(1, -1, 1, 1) * (entries.unsqueeze(-2) - at.unsqueeze(-1))
        bias = alibi if bias is None else bias + alibi
    out = attend(q, k, v, keep, bias, sinks, softmax_scale, softcap)
    scores = torch.matmul(q, k.mT) * softmax_scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = (scores if bias is None else scores + bias).masked_fill(~keep, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand_as(scores[..., :1])), -1)
    return out, torch.logsumexp(scores, -1)


def cost(
    description: KernelDescription, batch_size: int, num_heads: int, q_len: int, kv_len: int
) -> Cost:
    """Both products over kv_len entries; keys and values once, queries and outputs once."""
    width = description.head_dim + value_width(description)
    rows = batch_size * num_heads * q_len
    entries = batch_size * num_heads // description.group_size * kv_len
    entry = (description.weight_dtype or description.dtype).itemsize
    moved = width * (entries * entry + rows * description.dtype.itemsize) + 4 * rows
    return Cost(2.0 * rows * kv_len * width, float(moved), 1)


def _compiled_for(description: KernelDescription) -> KernelDescription:
    """Without what is an argument."""
    layout = "paged" if description.layout == "paged" else "bhsd"
    return replace(
        description,
        layout=layout,
        mask="full",
        span=0,
        num_sink_tokens=0,
        softcap=0.0,
        group_size=1,
        page_size=0,
    )


@functools.cache
def _entry(
    description: KernelDescription, isa: str
) -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    library = compile_library(DecodeAttention().source(description), isa=isa)
    library.decode_attention.argtypes = [ctypes.c_void_p]
    library.decode_attention.restype = None
    library.scratch_size.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.scratch_size.restype = ctypes.c_int64
    return library.decode_attention, library.scratch_size
