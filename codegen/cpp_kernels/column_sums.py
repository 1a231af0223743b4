"""How much attention every entry gets, without the matrix of probabilities.

    sums[b, kv_head, j] = Σ over query heads of the group and queries i of e^(score_ij - lse_i)

Layout: q bhsd, lse [batch_size, num_heads, q_len] from any attention that gives it, k bhsd with any
strides but head_dim's, float32 or bfloat16. In fp32. Memory: one number for an entry; probabilities live
as tiles of 16 queries and 64 entries. Bytes moved: keys once, queries once for every block of entries,
from a cache. One thread takes whole blocks, in turns, as causal attention makes the last ones cheap;
tiles that the mask hides are skipped. Source: https://arxiv.org/abs/2306.14048
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace

import torch
from torch import Tensor

from codegen.cpp_kernels.arguments import Arguments
from codegen.cpp_kernels.attention_inputs import AttentionInputs, element_type, refuse, unsupported
from codegen.cpp_kernels.compiler import compile_library, inline_headers
from codegen.cpp_kernels.provenance import provenance
from codegen.kernel import Kernel, KernelDescription
from rewriter.cost.cost import Cost
from rewriter.dialect.attention import MASKS, position_grid, repeat_kv, visible
from rewriter.errors import ConfigError

__all__ = ["ColumnSums", "column_sums", "cost", "reference"]

_ARGUMENTS = Arguments(
    q="const float*",
    lse="const float*",
    k="const Entry*",
    k_batch="int64_t",
    k_head="int64_t",
    k_entry="int64_t",
    batch_size="int64_t",
    num_kv_heads="int64_t",
    group_size="int64_t",
    q_len="int64_t",
    kv_len="int64_t",
    q_positions="const int64_t*",
    q_positions_batch="int64_t",
    k_positions="const int64_t*",
    k_positions_batch="int64_t",
    k_positions_head="int64_t",
    mask="int",
    span="int64_t",
    num_sink_tokens="int64_t",
    softmax_scale="float",
    softcap="float",
    sums="float*",
    threads="int",
)

_TEXT = """\
#include "column_sums.h"
#include "parallel.h"

typedef {entry} Entry;

{arguments}
extern "C" void column_sums(const Arguments* arguments) {{
    const Arguments& a = *arguments;
    rw::AttentionShape shape{{a.batch_size, a.num_kv_heads, a.group_size, a.q_len}};
    rw::Scores scores{{a.group_size, a.q_len, a.kv_len, rw::Mask(a.mask), a.span, a.num_sink_tokens}};
    scores.softcap = a.softcap;
    scores.q_positions = a.q_positions, scores.q_batch = a.q_positions_batch;
    scores.k_positions = a.k_positions, scores.k_batch = a.k_positions_batch;
    scores.k_head = a.k_positions_head;
    auto seeing = [&](int64_t begin, int64_t end) {{
        if (a.q_positions || a.k_positions) return rw::Range{{0, a.q_len}};
        return rw::queries_seeing(rw::Mask(a.mask), a.span, a.q_len, a.kv_len, begin, end);
    }};
    rw::parallel(a.threads, [&](int thread, int num_threads) {{
        rw::column_sums<{head_dim}>(shape, a.kv_len, a.q, a.lse, a.k, a.k_batch, a.k_head, a.k_entry,
                                    scores, a.softmax_scale, seeing, a.sums, thread, num_threads);
    }});
}}
"""


class ColumnSums(Kernel):
    """Masks as in `decode_attention`."""

    operator = "column_sums"
    backend = "cpu"

    def supports(self, description: KernelDescription) -> str | None:
        """A reason for other dtypes, layouts or masks; None otherwise."""
        if description.layout not in ("bhsd", "slots"):
            return f"layout={description.layout!r}: bhsd or slots"
        return unsupported(description)

    def source(self, description: KernelDescription) -> str:
        """C++ text with the entry point `column_sums`; ConfigError where it is not supported."""
        refusal = self.supports(description)
        if refusal is not None:
            raise ConfigError("description", str(description), refusal)
        text = _TEXT.format(
            entry=element_type(description.weight_dtype or description.dtype),
            head_dim=description.head_dim,
            arguments=_ARGUMENTS.text,
        )
        url = "https://arxiv.org/abs/2306.14048"
        name = "codegen.cpp_kernels.column_sums"
        return provenance(_compiled_for(description), name, url, inline_headers(text))


def column_sums(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    *,
    softmax_scale: float,
    threads: int | None = None,
    isa: str = "native",
) -> Tensor:
    """Sums of attention probabilities over queries and the heads of a group.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim] in the description's dtype.
        k: bhsd [batch_size, num_kv_heads, kv_len, head_dim] in its weight_dtype.
        lse: fp32 [batch_size, num_heads, q_len]; queries with -inf add nothing.
        q_positions, k_positions: as in `decode_attention`.
        threads: torch's number of threads unless given. isa: a key of `compiler.ISAS`.

    Returns:
        fp32 [batch_size, num_kv_heads, kv_len].

    Raises:
        InputError: a tensor of another shape, dtype or device. ConfigError: see `supports`.
    """
    function = _entry(_compiled_for(description), isa)
    inputs = AttentionInputs(replace(description, value_dim=0, form=""), q, k, k, None, None)
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32 or lse.device.type != "cpu":
        refuse("lse", lse, f"fp32 {tuple(q.shape[:3])} on the CPU")
    lse = lse.contiguous()
    sums = lse.new_empty(k.shape[:3])
    given = {**inputs.cache(), **inputs.positions(q_positions, k_positions, None, None)}
    unused = ("v", "v_batch", "v_head", "v_entry", "page_size")
    _ARGUMENTS.call(
        function,
        lse=lse,
        mask=(*MASKS, "sinks_window").index(description.mask),
        span=description.span,
        num_sink_tokens=description.num_sink_tokens,
        softmax_scale=softmax_scale,
        softcap=description.softcap,
        sums=sums,
        threads=threads or torch.get_num_threads(),
        **{name: value for name, value in given.items() if name not in unused},
    )
    return sums


def reference(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    *,
    softmax_scale: float,
    mask: str,
    span: int = 0,
    softcap: float = 0.0,
    num_sink_tokens: int = 0,
) -> Tensor:
    """What the kernel means, in fp32, with the whole matrix of probabilities."""
    keys = repeat_kv(k.float(), q.shape[1])
    at, entries = (p.unsqueeze(1) for p in position_grid(q, keys, q_positions, k_positions))
    keep = visible(at, entries, "sliding_window" if mask == "sinks_window" else mask, span)
    if mask == "sinks_window":
        keep |= visible(at, entries, "causal", 0) & (entries < num_sink_tokens).unsqueeze(-2)
    scores = q.float() @ keys.mT * softmax_scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    seen = keep & (lse > -torch.inf).unsqueeze(-1)
    probabilities = torch.where(seen, torch.exp(scores - lse.unsqueeze(-1)), 0.0)
    return probabilities.sum(2).unflatten(1, (k.shape[1], -1)).sum(2)


def cost(q: Tensor, k: Tensor, *, causal: bool) -> Cost:
    """One product over every visible pair; queries, keys and sums once."""
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] / (2 if causal else 1)
    moved = q.numel() * q.element_size() + k.numel() * k.element_size() + 4 * k[..., 0].numel()
    return Cost(2.0 * pairs * q.shape[3], float(moved), 1)


def _compiled_for(description: KernelDescription) -> KernelDescription:
    """Without what is an argument."""
    d = description
    return KernelDescription(
        operator=d.operator, head_dim=d.head_dim, weight_dtype=d.weight_dtype or d.dtype
    )


@functools.cache
def _entry(description: KernelDescription, isa: str) -> ctypes._NamedFuncPointer:
    function = compile_library(ColumnSums().source(description), isa=isa).column_sums
    function.argtypes, function.restype = [ctypes.c_void_p], None
    return function
