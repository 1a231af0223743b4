"""Attention over disjoint sets of entries, joined by their log-sum-exps.

    out = Σ_p e^(lse_p - lse) out_p,   lse = log Σ_p e^(lse_p)

Layout: parts [num_parts, ..., width], contiguous. In fp32, rounded once. Bytes moved: the parts once, the
result once; a part that saw nothing is not read. One thread joins whole rows.
Source: https://arxiv.org/abs/2402.05099
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from codegen.cpp_kernels.arguments import Arguments
from codegen.cpp_kernels.attention_inputs import element_type, refuse
from codegen.cpp_kernels.compiler import compile_library, inline_headers
from codegen.cpp_kernels.provenance import provenance
from codegen.kernel import Kernel, KernelDescription, dtype_name
from rewriter.cost.cost import Cost
from rewriter.errors import ConfigError

__all__ = ["MergeLse", "cost", "merge_lse", "reference"]

_ARGUMENTS = Arguments(
    parts="const Part*",
    lse="const float*",
    num_parts="int64_t",
    rows="int64_t",
    width="int64_t",
    out="Element*",
    out_lse="float*",
    scratch="float*",
    threads="int",
)

_TEXT = """\
#include "merge_lse.h"
#include "parallel.h"

typedef {element} Element;
typedef {part} Part;

{arguments}
extern "C" void merge_lse(const Arguments* arguments) {{
    const Arguments& a = *arguments;
    rw::parallel(a.threads, [&](int thread, int num_threads) {{
        rw::merge_lse(a.parts, a.rows * a.width, a.lse, a.rows, a.num_parts, a.rows, a.width, a.out,
                      a.out_lse, a.scratch, thread, num_threads);
    }});
}}
"""


class MergeLse(Kernel):
    """`dtype` is that of the result, `weight_dtype` (fp32 unless told) that of the parts."""

    operator = "merge_lse"
    backend = "cpu"

    def supports(self, description: KernelDescription) -> str | None:
        """A reason for other dtypes; None otherwise."""
        d = description
        for field, dtype in (("dtype", d.dtype), ("weight_dtype", d.weight_dtype)):
            if dtype not in (None, torch.float32, torch.bfloat16):
                return f"{field}={dtype_name(dtype)}: float32 or bfloat16"
        return "epilogue: none" if d.epilogue is not None else None

    def source(self, description: KernelDescription) -> str:
        """C++ text with the entry point `merge_lse`; ConfigError where it is not supported."""
        refusal = self.supports(description)
        if refusal is not None:
            raise ConfigError("description", str(description), refusal)
        text = _TEXT.format(
            element=element_type(description.dtype),
            part=element_type(description.weight_dtype or torch.float32),
            arguments=_ARGUMENTS.text,
        )
        url = "https://arxiv.org/abs/2402.05099"
        return provenance(description, "codegen.cpp_kernels.merge_lse", url, inline_headers(text))


def merge_lse(
    description: KernelDescription,
    parts: Tensor,
    lse: Tensor,
    *,
    threads: int | None = None,
    isa: str = "native",
) -> tuple[Tensor, Tensor]:
    """Join partial attentions.

    Args:
        parts: [num_parts, ..., width] in weight_dtype, fp32 unless told.
        lse: fp32 [num_parts, ...], -inf where a part saw nothing, whatever stands there.
        threads: torch's number of threads unless given. isa: a key of `compiler.ISAS`.

    Returns:
        out [..., width] in the description's dtype, and lse fp32 [...].

    Raises:
        InputError: a tensor of another shape, dtype or device.
    """
    dtype = description.weight_dtype or torch.float32
    if parts.dim() < 2 or parts.dtype != dtype or parts.device.type != "cpu":
        refuse("parts", parts, f"[num_parts, .., width] of {dtype_name(dtype)} on the CPU")
    if lse.shape != parts.shape[:-1] or lse.dtype != torch.float32 or lse.device.type != "cpu":
        refuse("lse", lse, f"fp32 {tuple(parts.shape[:-1])} on the CPU")
    parts, lse = parts.contiguous(), lse.contiguous()
    threads = threads or torch.get_num_threads()
    out = parts.new_empty(parts.shape[1:], dtype=description.dtype)
    out_lse = lse.new_empty(lse.shape[1:])
    compiled = KernelDescription(operator="merge_lse", dtype=out.dtype, weight_dtype=dtype)
    _ARGUMENTS.call(
        _entry(compiled, isa),
        parts=parts,
        lse=lse,
        num_parts=parts.shape[0],
        rows=out_lse.numel(),
        width=parts.shape[-1],
        out=out,
        out_lse=out_lse,
        scratch=lse.new_empty(threads * parts.shape[0]),
        threads=threads,
    )
    return out, out_lse


def reference(parts: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel means, in fp32."""
    total = torch.logsumexp(lse, 0)
    weights = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0)).unsqueeze(-1)
    return torch.where(weights > 0, weights * parts.float(), 0.0).sum(0), total


def cost(parts: Tensor) -> Cost:
    """Parts read once, one result written."""
    moved = parts.numel() * parts.element_size() * (1 + 1 / max(parts.shape[0], 1))
    return Cost(2.0 * parts.numel(), float(moved), 1)


@functools.cache
def _entry(description: KernelDescription, isa: str) -> ctypes._NamedFuncPointer:
    function = compile_library(MergeLse().source(description), isa=isa).merge_lse
    function.argtypes, function.restype = [ctypes.c_void_p], None
    return function
