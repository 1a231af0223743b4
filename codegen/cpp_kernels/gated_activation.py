"""act(gate) · up, elementwise: the middle of a gated feed-forward block.

Layout: rows of adjacent numbers, any one stride between rows of gate and of up, so that both may be halves
of one product's result. In fp32, rounded once. Bytes moved: gate and up once, the result once. One thread
computes an even share of all numbers. Source: https://arxiv.org/abs/2002.05202
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
from rewriter.dialect.mlp import ACTIVATIONS as MEANINGS
from rewriter.errors import ConfigError

__all__ = ["ACTIVATIONS", "GatedActivation", "cost", "gated_activation", "reference"]

ACTIVATIONS = {
    "silu": "rw::silu(x)",
    "gelu": "rw::gelu(x)",
    "gelu_tanh": "rw::gelu_tanh(x)",
    "quick_gelu": "rw::quick_gelu(x)",
    "relu": "rw::relu(x)",
    "relu_squared": "rw::relu(x) * rw::relu(x)",
    "sigmoid": "rw::sigmoid(x)",
    "tanh": "rw::tanh_(x)",
    "identity": "x",
}
"""Activations of `rewriter::gated_mlp` in C++."""

_ARGUMENTS = Arguments(
    gate="const Element*",
    gate_stride="int64_t",
    up="const Element*",
    up_stride="int64_t",
    rows="int64_t",
    width="int64_t",
    out="Element*",
    threads="int",
)

_TEXT = """\
#include "gated_activation.h"
#include "parallel.h"

typedef {element} Element;

{arguments}
extern "C" void gated_activation(const Arguments* arguments) {{
    const Arguments& a = *arguments;
    auto act = [](float x) {{ return {activation}; }};
    rw::parallel(a.threads, [&](int thread, int num_threads) {{
        rw::gated_activation(a.gate, a.gate_stride, a.up, a.up_stride, a.rows, a.width, a.out, act,
                             thread, num_threads);
    }});
}}
"""


class GatedActivation(Kernel):
    """`form` is the activation, a key of `ACTIVATIONS`."""

    operator = "gated_activation"
    backend = "cpu"

    def supports(self, description: KernelDescription) -> str | None:
        """A reason for other dtypes or activations; None otherwise."""
        if description.dtype not in (torch.float32, torch.bfloat16):
            return f"dtype={dtype_name(description.dtype)}: float32 or bfloat16"
        if description.form not in ACTIVATIONS:
            return f"form={description.form!r}: one of {', '.join(ACTIVATIONS)}"
        return "epilogue: none" if description.epilogue is not None else None

    def source(self, description: KernelDescription) -> str:
        """C++ text with the entry point `gated_activation`; ConfigError where it is not supported."""
        refusal = self.supports(description)
        if refusal is not None:
            raise ConfigError("description", str(description), refusal)
        text = _TEXT.format(
            element=element_type(description.dtype),
            arguments=_ARGUMENTS.text,
            activation=ACTIVATIONS[description.form],
        )
        url = "https://arxiv.org/abs/2002.05202"
        name = "codegen.cpp_kernels.gated_activation"
        return provenance(description, name, url, inline_headers(text))


def gated_activation(
    description: KernelDescription,
    gate: Tensor,
    up: Tensor,
    *,
    threads: int | None = None,
    isa: str = "native",
) -> Tensor:
    """act(gate) · up, contiguous.

    Args:
        gate, up: [..., width] in the description's dtype.
        threads: torch's number of threads unless given. isa: a key of `compiler.ISAS`.

    Raises:
        InputError: a tensor of another shape, dtype or device.
    """
    for name, tensor in (("gate", gate), ("up", up)):
        good = tensor.dtype == description.dtype and tensor.shape == gate.shape
        if not good or not tensor.dim() or tensor.device.type != "cpu":
            shape = tuple(gate.shape)
            refuse(name, tensor, f"{shape} of {dtype_name(description.dtype)} on the CPU")
    width = gate.shape[-1]
    flat = [t.reshape(-1, width) if width else t for t in (gate, up)]
    flat = [t if width and t.stride(1) == 1 else t.contiguous() for t in flat]
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    _ARGUMENTS.call(
        _entry(description, isa),
        gate=flat[0],
        gate_stride=flat[0].stride(0),
        up=flat[1],
        up_stride=flat[1].stride(0),
        rows=flat[0].shape[0],
        width=width,
        out=out,
        threads=threads or torch.get_num_threads(),
    )
    return out


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """What the kernel means, in fp32, rounded once."""
    return (MEANINGS[activation](gate.float()) * up.float()).to(gate.dtype)


def cost(gate: Tensor) -> Cost:
    """Two tensors read, one written."""
    return Cost(8.0 * gate.numel(), 3.0 * gate.numel() * gate.element_size(), 1)


@functools.cache
def _entry(description: KernelDescription, isa: str) -> ctypes._NamedFuncPointer:
    library = compile_library(GatedActivation().source(description), isa=isa)
    library.gated_activation.argtypes = [ctypes.c_void_p]
    library.gated_activation.restype = None
    return library.gated_activation
