"""RMSNorm and LayerNorm of rows, with the residual sum in front of them.

    h = x + residual
    rms:   h / sqrt(mean(h²) + eps) · (weight_offset + weight)
    layer: (h - mean) / sqrt(mean((h - mean)²) + eps) · (weight_offset + weight) + bias

Layout: rows of adjacent numbers, any stride between rows. Accumulation: fp32, the sum rounded to its dtype
first as a model would; the mean of squares of far values in a pass of its own. Bytes moved: x (and the
residual) once, the results once; a row stays in the first-level cache between its passes. One thread
computes whole rows. Sources: https://arxiv.org/abs/1910.07467, https://arxiv.org/abs/1607.06450
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
from rewriter.dialect import norm
from rewriter.errors import ConfigError, InputError

__all__ = ["RmsNorm", "cost", "reference", "rms_norm"]

_ARGUMENTS = Arguments(
    x="const Element*",
    residual="const Element*",
    sum="Element*",
    rows="int64_t",
    width="int64_t",
    weight="const Weight*",
    bias="const Weight*",
    weight_offset="float",
    eps="float",
    out="Element*",
    threads="int",
)

_TEXT = """\
#include "parallel.h"
#include "rms_norm.h"

typedef {element} Element;
typedef {weight} Weight;

{arguments}
extern "C" void norm(const Arguments* arguments) {{
    const Arguments& a = *arguments;
    rw::parallel(a.threads, [&](int thread, int num_threads) {{
        rw::{call}(a.x, a.residual, a.sum, a.rows, a.width, a.width, a.weight, a.weight_offset,{bias}
                     a.eps, a.out, thread, num_threads);
    }});
}}
"""


class RmsNorm(Kernel):
    """`form` is `""` for RMSNorm or `"layer"` for LayerNorm."""

    operator = "rms_norm"
    backend = "cpu"

    def supports(self, description: KernelDescription) -> str | None:
        """A reason for other dtypes or forms; None otherwise."""
        d = description
        for field, dtype in (("dtype", d.dtype), ("weight_dtype", d.weight_dtype)):
            if dtype not in (None, torch.float32, torch.bfloat16):
                return f"{field}={dtype_name(dtype)}: float32 or bfloat16"
        if d.form not in ("", "layer"):
            return f'form={d.form!r}: "" or "layer"'
        return "epilogue: none" if d.epilogue is not None else None

    def source(self, description: KernelDescription) -> str:
        """C++ text with the entry point `norm`; ConfigError where it is not supported."""
        refusal = self.supports(description)
        if refusal is not None:
            raise ConfigError("description", str(description), refusal)
        layer = description.form == "layer"
        text = _TEXT.format(
            element=element_type(description.dtype),
            weight=element_type(description.weight_dtype or description.dtype),
            arguments=_ARGUMENTS.text,
            call="layer_norm" if layer else "rms_norm",
            bias=" a.bias," if layer else "",
        )
        url = "https://arxiv.org/abs/1910.07467"
        return provenance(description, "codegen.cpp_kernels.rms_norm", url, inline_headers(text))


def rms_norm(
    description: KernelDescription,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    threads: int | None = None,
    isa: str = "native",
) -> tuple[Tensor, Tensor]:
    """The norm over the last dimension of x, or of x + residual.

    Args:
        x, residual: [..., width] in the description's dtype.
        weight, bias: [width] in its weight_dtype; bias only of form `layer`.
        threads: torch's number of threads unless given. isa: a key of `compiler.ISAS`.

    Returns:
        The norm, and what it was taken from: x + residual, or x itself.

    Raises:
        InputError: a tensor of another shape, dtype or device.
    """
    d, width = description, x.shape[-1]
    for name, tensor, dtype, shape in (
        ("x", x, d.dtype, x.shape),
        ("residual", residual, d.dtype, x.shape),
        ("weight", weight, d.weight_dtype or d.dtype, (width,)),
        ("bias", bias, d.weight_dtype or d.dtype, (width,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu":
            refuse(name, tensor, f"{tuple(shape)} of {dtype_name(dtype)} on the CPU")
    if bias is not None and d.form != "layer":
        raise InputError("bias is not allowed: only LayerNorm has one")
    x = x.contiguous()
    given = [t if t is None else t.contiguous() for t in (weight, bias, residual)]
    out = torch.empty_like(x)
    total = torch.empty_like(x) if residual is not None else x
    _ARGUMENTS.call(
        _entry(replace(d, weight_dtype=d.weight_dtype or d.dtype), isa),
        x=x,
        weight=given[0],
        bias=given[1],
        residual=given[2],
        sum=total,
        rows=x.numel() // max(width, 1),
        width=width,
        weight_offset=weight_offset,
        eps=eps,
        out=out,
        threads=threads or torch.get_num_threads(),
    )
    return out, total


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    layer: bool = False,
) -> tuple[Tensor, Tensor]:
    """What the kernel means, as the dialect's operators compute it."""
    total = x if residual is None else x + residual
    wide = weight if weight is None else weight.float()
    if not layer:
        options = {"eps": eps, "weight_offset": weight_offset, "wide_weight": True}
        return norm.rms_norm.reference(total, wide, **options).to(x.dtype), total
    scale = None if wide is None else wide + weight_offset
    shift = bias if bias is None else bias.float()
    return norm.layer_norm.reference(total.float(), scale, shift, eps=eps).to(x.dtype), total


def cost(x: Tensor, *, residual: bool = False) -> Cost:
    """x read and the norm written; with a residual that is read and the sum written, too."""
    moved = x.numel() * x.element_size() * (4 if residual else 2)
    return Cost(4.0 * x.numel(), float(moved), 1)


@functools.cache
def _entry(description: KernelDescription, isa: str) -> ctypes._NamedFuncPointer:
    function = compile_library(RmsNorm().source(description), isa=isa).norm
    function.argtypes, function.restype = [ctypes.c_void_p], None
    return function
