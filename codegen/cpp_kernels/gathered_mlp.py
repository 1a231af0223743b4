"""A gated feed-forward block over some of its neurons, for one token.

    out = Σ_{i kept} activation(gate[i] · x) · (up[i] · x) · down[i]

Forms: kept neurons are given (`indices`: chosen once a prompt), or the `top_k` with the largest
|activation(gate · x)|, or all where that is above a `threshold`; the last two read all of gate.
Layout: x [in_size]; gate, up [intermediate_size, in_size]; down [intermediate_size, out_size], so stored
transposed; columns one element apart, rows any stride. Accumulation: fp32, rounded once at the end.
Bytes moved: three rows of each kept neuron, and gate where it is dense. One thread computes a share of
the kept neurons into a sum of its own; the sums are added at the end. Sources:
https://arxiv.org/abs/2402.19427 (prompt), https://arxiv.org/abs/2404.08763 (threshold),
https://arxiv.org/abs/2409.03856 (both, as drafts that are corrected).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from codegen.cpp_kernels.compiler import compile_library, inline_headers, machine
from codegen.cpp_kernels.gemv import CPP_TYPES
from codegen.cpp_kernels.provenance import provenance
from codegen.cpp_kernels.sweep import DEFAULT, SweepConfig, candidates, least_seconds
from codegen.kernel import Kernel, KernelDescription, dtype_name
from codegen.tuning import Problem, choose, current
from rewriter.cost.cost import Cost
from rewriter.dialect.mlp import ACTIVATIONS
from rewriter.errors import ConfigError, InputError

__all__ = [
    "GatheredMlp",
    "cost",
    "gathered_mlp",
    "kept_above",
    "kept_largest",
    "reference",
    "threshold_mlp",
    "top_k_mlp",
]

_SOURCE = "https://arxiv.org/abs/2409.03856"
_CPP_ACTIVATIONS = {
    "silu": "rw::silu(g)",
    "gelu": "rw::gelu(g)",
    "gelu_tanh": "rw::gelu_tanh(g)",
    "quick_gelu": "rw::quick_gelu(g)",
    "relu": "rw::relu(g)",
    "relu_squared": "rw::relu(g) * rw::relu(g)",
    "sigmoid": "rw::sigmoid(g)",
    "tanh": "rw::tanh_(g)",
    "identity": "g",
}
_INDEX_TYPES = {"indices": "int64_t", "indices32": "int32_t"}
_KEEP = {
    "top_k": ("int64_t", "rw::keep_largest(gated, intermediate_size, keep)"),
    "threshold": ("float", "rw::keep_above(gated, intermediate_size, keep)"),
}

_START = """\
#include "functions.h"
#include "gathered_mlp.h"
#include "parallel.h"

typedef {element} Element;
typedef {weight} Weight;

inline float activation(float g) {{ return {activation}; }}

"""
_GIVEN = """\
// Returns 1, and reads no weights, where an index is no neuron.
// scratch: in_size + count + threads * out_size floats.
extern "C" int gathered_mlp(const Element* x, rw::GatedWeights<Weight> weights, const {index}* indices,
                            int64_t count, int64_t intermediate_size, Element* out, float* scratch,
                            int threads) {{
    for (int64_t j = 0; j < count; ++j)
        if (indices[j] < 0 || indices[j] >= intermediate_size) return 1;
    float *wide = scratch, *active = wide + weights.in_size, *partial = active + count;
    auto neuron = [](int64_t, float gate, float up) {{ return activation(gate) * up; }};
    auto store = [&](int64_t c, float value) {{ out[c] = rw::from_float<Element>(value); }};
    rw::parallel(threads, [&](int thread, int num_threads) {{
        rw::widen(x, 0, wide, 1, weights.in_size, thread, num_threads);
        rw::barrier();
        rw::gathered_neurons(weights, wide, indices, count, neuron, active, partial, thread,
                             num_threads);
        rw::barrier();
        rw::add_partials(partial, weights.out_size, store, thread, num_threads);
    }});
    return 0;
}}
"""
_CHOSEN = """\
// scratch: in_size + (2 + threads) * intermediate_size + threads * out_size floats.
extern "C" int gathered_mlp(const Element* x, rw::GatedWeights<Weight> weights, {keep_type} keep,
                            int64_t intermediate_size, Element* out, float* scratch, int threads) {{
    float *wide = scratch, *gated = wide + weights.in_size, *active = gated + intermediate_size;
    int32_t* lists = (int32_t*)(active + intermediate_size);
    float* partial = active + (1 + threads) * intermediate_size;
    auto activate = [&](int64_t i, float gate) {{ gated[i] = activation(gate); }};
    auto neuron = [](int64_t, float gate, float up) {{ return gate * up; }};
    auto store = [&](int64_t c, float value) {{ out[c] = rw::from_float<Element>(value); }};
    rw::parallel(threads, [&](int thread, int num_threads) {{
        rw::widen(x, 0, wide, 1, weights.in_size, thread, num_threads);
        rw::barrier();
        rw::gemv(weights.gate, weights.gate_stride, wide, intermediate_size, weights.in_size, activate,
                 thread, num_threads);
        rw::barrier();
        rw::Kept kept = {kept};
        rw::kept_neurons(weights, wide, gated, intermediate_size, kept, neuron, lists, active, partial,
                         thread, num_threads);
        rw::barrier();
        rw::add_partials(partial, weights.out_size, store, thread, num_threads);
    }});
    return 0;
}}
"""


class GatheredMlp(Kernel):
    """`form` is `"<activation>:<which>"`: a key of the dialect's `ACTIVATIONS`; which neurons are kept:
    `indices` (int64), `indices32`, `top_k` or `threshold`."""

    operator = "gathered_mlp"
    backend = "cpu"

    def supports(self, description: KernelDescription) -> str | None:
        """A reason for other dtypes, forms, or an epilogue; None otherwise."""
        activation, _, which = description.form.partition(":")
        for field in ("dtype", "weight_dtype"):
            dtype = getattr(description, field)
            if dtype not in (torch.float32, torch.bfloat16, *([None] if field != "dtype" else [])):
                return f"{field}={dtype_name(dtype)}: float32 or bfloat16"
        if activation not in _CPP_ACTIVATIONS or which not in {**_INDEX_TYPES, **_KEEP}:
            names, kinds = ", ".join(_CPP_ACTIVATIONS), ", ".join({**_INDEX_TYPES, **_KEEP})
            return f"form={description.form!r}: one of {names}, a colon, and one of {kinds}"
        return None if description.epilogue is None else "epilogue: none"

    def source(self, description: KernelDescription) -> str:
        """C++ text with the entry point `gathered_mlp`; ConfigError where it is not supported."""
        return self.configured_source(description, DEFAULT)

    def configured_source(self, description: KernelDescription, config: SweepConfig) -> str:
        """The same with other knobs; their number of threads is an argument of the call."""
        refusal = self.supports(description)
        if refusal is not None:
            raise ConfigError("description", str(description), refusal)
        activation, _, which = description.form.partition(":")
        start = _START.format(
            element=CPP_TYPES[description.dtype],
            weight=CPP_TYPES[description.weight_dtype or description.dtype],
            activation=_CPP_ACTIVATIONS[activation],
        )
        if which in _INDEX_TYPES:
            entry = _GIVEN.format(index=_INDEX_TYPES[which])
        else:
            entry = _CHOSEN.format(keep_type=_KEEP[which][0], kept=_KEEP[which][1])
        text = config.defines() + inline_headers(start + entry)
        return provenance(description, "codegen.cpp_kernels.gathered_mlp", _SOURCE, text)


def gathered_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    indices: Tensor,
    *,
    activation: str,
    threads: int | None = None,
    isa: str = "native",
) -> Tensor:
    """The block over the neurons in `indices`.

    Args:
        x: [..., in_size], one token, float32 or bfloat16.
        gate, up: [intermediate_size, in_size]; down: [intermediate_size, out_size]: all float32 or
            all bfloat16.
        indices: [count], int64 or int32, of neurons in any order.
        activation: a key of the dialect's `ACTIVATIONS`.
        threads: torch's number of threads unless given.
        isa: a key of `compiler.ISAS`.

    Raises:
        InputError: a tensor of another shape, dtype or device, or an index out of range.
        ConfigError: an unknown activation, or no compiler.
    """
    if indices.dim() != 1 or indices.dtype not in (torch.int64, torch.int32):
        told = f"{tuple(indices.shape)} {dtype_name(indices.dtype)}"
        raise InputError(f"indices={told} is not allowed: a vector of int64 or int32")
    indices = indices.contiguous()
    which = "indices" if indices.dtype == torch.int64 else "indices32"
    kept = (indices.data_ptr(), indices.numel())
    return _launch(x, gate, up, down, kept, f"{activation}:{which}", threads, isa)


def top_k_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    keep: int,
    *,
    activation: str,
    threads: int | None = None,
    isa: str = "native",
) -> Tensor:
    """The block over the `keep` neurons with the largest |activation(gate · x)|, of equal ones the first.

    Arguments and errors as of `gathered_mlp`; all neurons where `keep` is their number or more.
    """
    return _launch(x, gate, up, down, (keep,), f"{activation}:top_k", threads, isa)


def threshold_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: float,
    *,
    activation: str,
    threads: int | None = None,
    isa: str = "native",
) -> Tensor:
    """The block over the neurons with |activation(gate · x)| above `threshold`, or not a number.

    Arguments and errors as of `gathered_mlp`.
    """
    return _launch(x, gate, up, down, (threshold,), f"{activation}:threshold", threads, isa)


def reference(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, indices: Tensor, *, activation: str
) -> Tensor:
    """What `gathered_mlp` means, in fp32, rounded once at the end."""
    wide = x.float()
    gated = ACTIVATIONS[activation](wide @ gate[indices].float().T)
    active = gated * (wide @ up[indices].float().T)
    return (active @ down[indices].float()).to(x.dtype)


def kept_largest(gated: Tensor, keep: int) -> Tensor:
    """Indices, rising, of the `keep` largest magnitudes of a vector; of equal ones the first."""
    order = gated.abs().sort(descending=True, stable=True).indices
    return order[: max(keep, 0)].sort().values


def kept_above(gated: Tensor, threshold: float) -> Tensor:
    """Indices, rising, of the magnitudes above the threshold; a NaN is."""
    return (~(gated.abs() <= threshold)).nonzero()[:, 0]


def cost(x: Tensor, gate: Tensor, down: Tensor, count: int, *, gate_is_dense: bool) -> Cost:
    """Of one call with `count` kept neurons."""
    (intermediate_size, in_size), out_size = gate.shape, down.shape[1]
    gates = intermediate_size if gate_is_dense else count
    weights = float(gates * in_size + count * (in_size + out_size))
    activations = (in_size + out_size) * x.element_size()
    return Cost(2 * weights, weights * gate.element_size() + activations, 1)


class _Weights(ctypes.Structure):
    """`rw::GatedWeights`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "down")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("gate", "up", "down")),
        *((name, ctypes.c_int64) for name in ("in_size", "out_size")),
    )


def _launch(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    kept: tuple[Any, ...],
    form: str,
    threads: int | None,
    isa: str,
) -> Tensor:
    (intermediate_size, in_size), out_size = _checked(x, gate, up, down), down.shape[1]
    threads = threads or torch.get_num_threads()
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], out_size))
    lists = kept[1] if len(kept) == 2 else (2 + threads) * intermediate_size
    scratch = torch.empty(in_size + lists + threads * out_size)
    weights = _Weights(
        *(w.data_ptr() for w in (gate, up, down)),
        *(w.stride(0) for w in (gate, up, down)),
        in_size,
        out_size,
    )
    places = out.data_ptr(), scratch.data_ptr()

    def run(config: SweepConfig) -> None:
        entry = _entry(x.dtype, gate.dtype, form, isa, config)
        number = config.threads or threads
        if entry(x.data_ptr(), weights, *kept, intermediate_size, *places, number) != 0:
            raise InputError(f"indices are not allowed: each from 0 to {intermediate_size - 1}")

    if current() is None:
        run(DEFAULT)
        return out
    sizes = {"rows": intermediate_size, "columns": in_size, "out_size": out_size}
    sizes |= {"kept": kept[1] if len(kept) == 2 else intermediate_size, "vectors": 1}
    sizes |= {"element_bytes": x.element_size(), "weight_bytes": gate.element_size()}
    text = _default_text(x.dtype, gate.dtype, form)
    device = f"{machine()} {isa} threads={threads}"
    problem = Problem("gathered_mlp cpu", text, sizes, device)
    run(choose(problem, candidates(threads), DEFAULT, lambda c: least_seconds(lambda: run(c))))
    return out


def _checked(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[int, int]:
    """intermediate_size and in_size."""
    if gate.dim() != 2 or up.shape != gate.shape or down.dim() != 2 or len(down) != len(gate):
        told = ", ".join(str(tuple(w.shape)) for w in (gate, up, down))
        allowed = "gate and up [intermediate_size, in_size], down [intermediate_size, out_size]"
        raise InputError(f"weights={told} are not allowed: {allowed}")
    if any(
        w.dtype != gate.dtype or (w.shape[1] > 1 and w.stride(1) != 1) for w in (gate, up, down)
    ):
        raise InputError("weights are not allowed: one dtype, and columns one element apart")
    if not x.dim() or x.numel() != gate.shape[1] or x.shape[-1] != gate.shape[1]:
        raise InputError(f"x={tuple(x.shape)} is not allowed: one token of {gate.shape[1]} numbers")
    if any(t.dtype not in (torch.float32, torch.bfloat16) for t in (x, gate)):
        told = f"{dtype_name(x.dtype)}, {dtype_name(gate.dtype)}"
        raise InputError(f"dtypes={told} are not allowed: float32 or bfloat16")
    if any(t.device.type != "cpu" for t in (x, gate, up, down)):
        raise InputError("device is not allowed: all tensors on the CPU")
    return gate.shape[0], gate.shape[1]


def _described(dtype: torch.dtype, weight_dtype: torch.dtype, form: str) -> KernelDescription:
    return KernelDescription(
        operator="gathered_mlp", dtype=dtype, weight_dtype=weight_dtype, form=form
    )


@functools.cache
def _default_text(dtype: torch.dtype, weight_dtype: torch.dtype, form: str) -> str:
    return GatheredMlp().source(_described(dtype, weight_dtype, form))


@functools.cache
def _entry(
    dtype: torch.dtype, weight_dtype: torch.dtype, form: str, isa: str, config: SweepConfig
) -> ctypes._NamedFuncPointer:
    text = GatheredMlp().configured_source(_described(dtype, weight_dtype, form), config)
    function = compile_library(text, isa=isa).gathered_mlp
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    which = form.partition(":")[2]
    kept = {"top_k": [size], "threshold": [ctypes.c_float]}.get(which, [pointer, size])
    function.argtypes = [pointer, _Weights, *kept, size, pointer, pointer, ctypes.c_int]
    function.restype = ctypes.c_int
    return function
