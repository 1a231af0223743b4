"""Which pages of a cache the heads vote for, as TokenSelect chooses what a token attends to.

    vote_t = Σ_h softmax_t(softmax_scale · q_h · k_{h // group_size, t}),   first <= t < last
    page   = the largest or the sum of its entries' votes; then the pages with most votes

Layout: q [batch_size, num_heads, head_dim]; k bhsd with any strides but head_dim's, float32 or bfloat16.
In fp32. Bytes moved: keys once, one fp32 score for every head and entry written and read. One thread
scores whole blocks of 64 entries for all heads of a group, then votes for whole pages.
Source: https://arxiv.org/abs/2411.02886
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace

import torch
from torch import Tensor

from codegen.cpp_kernels.arguments import Arguments
from codegen.cpp_kernels.attention_inputs import element_type, refuse, unsupported
from codegen.cpp_kernels.compiler import compile_library, inline_headers
from codegen.cpp_kernels.provenance import provenance
from codegen.kernel import Kernel, KernelDescription, dtype_name
from rewriter.cost.cost import Cost
from rewriter.dialect.attention import repeat_kv
from rewriter.errors import ConfigError, InputError

__all__ = ["PageScores", "cost", "page_scores", "reference"]

_ARGUMENTS = Arguments(
    q="const float*",
    k="const Entry*",
    k_batch="int64_t",
    k_head="int64_t",
    k_entry="int64_t",
    batch_size="int64_t",
    num_kv_heads="int64_t",
    group_size="int64_t",
    first="int64_t",
    last="int64_t",
    page_size="int64_t",
    keep="int64_t",
    largest="bool",
    softmax_scale="float",
    scratch="float*",
    order="int64_t*",
    votes="float*",
    chosen="int64_t*",
    threads="int",
)

_TEXT = """\
#include "page_scores.h"
#include "parallel.h"

typedef {entry} Entry;

{arguments}
static rw::PageShape shape_of(const Arguments& a) {{
    return {{a.batch_size, a.num_kv_heads, a.group_size, a.first, a.last, a.page_size}};
}}
extern "C" int64_t scratch_size(const Arguments* a) {{ return rw::page_scratch(shape_of(*a)); }}

extern "C" void page_scores(const Arguments* arguments) {{
    const Arguments& a = *arguments;
    rw::PageShape shape = shape_of(a);
    rw::parallel(a.threads, [&](int thread, int num_threads) {{
        rw::page_products<{head_dim}>(shape, a.q, a.k, a.k_batch, a.k_head, a.k_entry,
                                      a.softmax_scale, a.scratch, thread, num_threads);
        rw::barrier();
        rw::page_totals(shape, a.scratch, thread, num_threads);
        rw::barrier();
        rw::page_votes(shape, a.scratch, a.largest, a.votes, thread, num_threads);
        rw::barrier();
        rw::top_pages(a.votes, a.batch_size, shape.pages(), a.keep, a.order, a.chosen, thread,
                      num_threads);
    }});
}}
"""


class PageScores(Kernel):
    """`form` is how votes become a page's: `"largest"` or `"sum"`; `page_size` 1 chooses entries."""

    operator = "page_scores"
    backend = "cpu"

    def supports(self, description: KernelDescription) -> str | None:
        """A reason for other dtypes, layouts or forms; None otherwise."""
        if description.layout != "bhsd":
            return f"layout={description.layout!r}: bhsd"
        if description.form not in ("largest", "sum"):
            return f'form={description.form!r}: "largest" or "sum"'
        if description.page_size < 1:
            return f"page_size={description.page_size}: at least 1"
        return unsupported(description)

    def source(self, description: KernelDescription) -> str:
        """C++ text with the entry points `page_scores` and `scratch_size`."""
        refusal = self.supports(description)
        if refusal is not None:
            raise ConfigError("description", str(description), refusal)
        text = _TEXT.format(
            entry=element_type(description.weight_dtype or description.dtype),
            head_dim=description.head_dim,
            arguments=_ARGUMENTS.text,
        )
        url = "https://arxiv.org/abs/2411.02886"
        name = "codegen.cpp_kernels.page_scores"
        return provenance(_compiled_for(description), name, url, inline_headers(text))


def page_scores(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    *,
    keep: int,
    first: int = 0,
    last: int | None = None,
    softmax_scale: float = 1.0,
    threads: int | None = None,
    isa: str = "native",
) -> tuple[Tensor, Tensor]:
    """Votes of all pages and the pages with most of them.

    Args:
        q: [batch_size, num_heads, head_dim] in the description's dtype.
        k: bhsd [batch_size, num_kv_heads, kv_len, head_dim] in its weight_dtype.
        keep: pages to choose, at most all.
        first, last: entries that are asked about; pages count from `first`, the last may be short.
        softmax_scale: 1 in the paper.
        threads: torch's number of threads unless given. isa: a key of `compiler.ISAS`.

    Returns:
        votes fp32 [batch_size, pages]; chosen int64 [batch_size, keep], ascending; of pages with equal
        votes the first are chosen.

    Raises:
        InputError: a tensor of another shape, dtype or device, or a range outside of the cache.
    """
    d, entry = description, description.weight_dtype or description.dtype
    function, scratch_size = _entry(_compiled_for(d), isa)
    if q.dim() != 3 or q.shape[2] != d.head_dim or q.dtype != d.dtype or q.device.type != "cpu":
        refuse("q", q, f"[batch_size, num_heads, {d.head_dim}] of {dtype_name(d.dtype)} on the CPU")
    good = k.dim() == 4 and k.shape[3] == d.head_dim and k.shape[0] == q.shape[0] and k.shape[1]
    if not good or q.shape[1] % k.shape[1] or k.dtype != entry or k.device.type != "cpu":
        refuse("k", k, f"[batch_size, divisor of heads, kv_len, {d.head_dim}] on the CPU")
    last = k.shape[2] if last is None else last
    if not 0 <= first < last <= k.shape[2]:
        raise InputError(f"entries {first} to {last} are not allowed: within {k.shape[2]}")
    pages = -(-(last - first) // d.page_size)
    if not 0 <= keep <= pages:
        raise InputError(f"keep={keep} is not allowed: 0 to {pages} pages")
    wide, k = q.float().contiguous(), k if k.stride(3) == 1 else k.contiguous()
    votes = wide.new_empty((q.shape[0], pages))
    order, chosen = (torch.empty((q.shape[0], n), dtype=torch.int64) for n in (pages, keep))
    given = {
        "q": wide,
        "k": k,
        "k_batch": k.stride(0),
        "k_head": k.stride(1),
        "k_entry": k.stride(2),
        "batch_size": q.shape[0],
        "num_kv_heads": k.shape[1],
        "group_size": q.shape[1] // k.shape[1],
        "first": first,
        "last": last,
        "page_size": d.page_size,
    }
    scratch = wide.new_empty(_ARGUMENTS.call(scratch_size, **given))
    _ARGUMENTS.call(
        function,
        keep=keep,
        largest=d.form == "largest",
        softmax_scale=softmax_scale,
        scratch=scratch,
        order=order,
        votes=votes,
        chosen=chosen,
        threads=threads or torch.get_num_threads(),
        **given,
    )
    return votes, chosen


def reference(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    *,
    first: int,
    last: int,
    softmax_scale: float = 1.0,
) -> Tensor:
    """The votes in plain PyTorch, fp32."""
    keys = repeat_kv(k[:, :, first:last].float(), q.shape[1])
    scores = (keys @ q.float().unsqueeze(-1)).squeeze(-1) * softmax_scale
    votes = scores.softmax(-1).sum(1)
    size, largest = description.page_size, description.form == "largest"
    short = -votes.shape[1] % size
    empty = -torch.inf if largest else 0.0
    votes = torch.nn.functional.pad(votes, (0, short), value=empty).unflatten(1, (-1, size))
    return votes.amax(-1) if largest else votes.sum(-1)


def cost(description: KernelDescription, batch_size: int, num_heads: int, kv_len: int) -> Cost:
    """Keys once, scores written and read."""
    entry = (description.weight_dtype or description.dtype).itemsize
    keys = batch_size * num_heads // description.group_size * kv_len * description.head_dim
    scores = batch_size * num_heads * kv_len
    return Cost(2.0 * scores * description.head_dim, float(keys * entry + 8 * scores), 1)


def _compiled_for(description: KernelDescription) -> KernelDescription:
    """Without what is an argument."""
    d = description
    entry = d.weight_dtype or d.dtype
    return replace(
        d, dtype=torch.float32, weight_dtype=entry, group_size=1, form="sum", page_size=1
    )


@functools.cache
def _entry(
    description: KernelDescription, isa: str
) -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    library = compile_library(PageScores().source(description), isa=isa)
    for function, result in ((library.page_scores, None), (library.scratch_size, ctypes.c_int64)):
        function.argtypes, function.restype = [ctypes.c_void_p], result
    return library.page_scores, library.scratch_size
