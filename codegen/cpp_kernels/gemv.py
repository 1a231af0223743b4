"""Products of up to eight vectors with one matrix, at the speed at which its weights can be read.

    out[m, row] = epilogue(scale[row] · Σ_c weight[row, c] · x[m, c] + bias[row])

Layout: x [vectors, in_size] and weight [out_size, in_size] with columns one element apart, rows any
stride. Accumulation: fp32; int8 weights become fp32 in registers, activations are never quantised.
Bytes moved: the weights once, whatever the number of vectors. One thread computes a contiguous share
of the rows, eight (fewer with more vectors) side by side. Source: rows of int8 with one scale each are
those of https://arxiv.org/abs/2208.07339, section 2.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from codegen.cpp_kernels.compiler import compile_library, inline_headers, machine
from codegen.cpp_kernels.provenance import provenance
from codegen.cpp_kernels.sweep import DEFAULT, SweepConfig, candidates, least_seconds
from codegen.epilogue import Epilogue
from codegen.kernel import Kernel, KernelDescription, dtype_name
from codegen.tuning import Problem, choose, current
from rewriter.cost.cost import Cost
from rewriter.dialect.int8 import quantize_rows
from rewriter.errors import ConfigError, InputError

__all__ = ["CPP_TYPES", "MAX_VECTORS", "Gemv", "cost", "gemv", "quantize_rows", "reference"]

_SOURCE = "https://arxiv.org/abs/2208.07339"
MAX_VECTORS = 8
CPP_TYPES = {torch.float32: "float", torch.bfloat16: "rw::bf16", torch.int8: "int8_t"}
"""Element types of weights in C++; activations have the first two."""
_ACTIVATION_TYPES = (torch.float32, torch.bfloat16)

_TEXT = """\
#include "functions.h"
#include "gemv.h"
#include "parallel.h"

typedef {element} Element;
typedef {weight} Weight;
constexpr int VECTORS = {vectors};

// wide is scratch of VECTORS * columns floats; scale and bias may be null.
extern "C" void gemv(const Element* x, int64_t x_stride, const Weight* weight, int64_t weight_stride,
                     const float* scale, const Element* bias, {result}* out, int64_t out_stride,
                     int64_t rows, int64_t columns, float* wide, int threads{parameters}) {{
    rw::parallel(threads, [&](int thread, int num_threads) {{
{read}        auto store = [&](int64_t row, int m, float value) {{
            if (scale) value *= scale[row];
            if (bias) value += rw::to_float(bias[row]);
{epilogue}            out[m * out_stride + row] = rw::from_float<{result}>(value);
        }};
        rw::gemm_rows<VECTORS>(weight, weight_stride, {vector}, rows, columns, store, thread,
                               num_threads);
    }});
}}
"""
_WIDEN = """\
        rw::widen(x, x_stride, wide, VECTORS, columns, thread, num_threads);
        rw::barrier();
"""


class Gemv(Kernel):
    """`form` is `""` for one vector, else their number, `"2"` to `"8"`."""

    operator = "gemv"
    backend = "cpu"

    def supports(self, description: KernelDescription) -> str | None:
        """A reason for other dtypes or more vectors; None otherwise."""
        weight_dtype = description.weight_dtype or description.dtype
        if description.dtype not in _ACTIVATION_TYPES:
            return f"dtype={dtype_name(description.dtype)}: float32 or bfloat16"
        if weight_dtype not in CPP_TYPES:
            return f"weight_dtype={dtype_name(weight_dtype)}: float32, bfloat16 or int8"
        if description.form not in ("", *map(str, range(2, MAX_VECTORS + 1))):
            return (
                f'form={description.form!r}: "", or the number of vectors, "2" to "{MAX_VECTORS}"'
            )
        return _epilogue_refusal(description.epilogue)

    def source(self, description: KernelDescription) -> str:
        """C++ text with the entry point `gemv`; ConfigError where it is not supported."""
        return self.configured_source(description, DEFAULT)

    def configured_source(self, description: KernelDescription, config: SweepConfig) -> str:
        """The same with other knobs; their number of threads is an argument of the call."""
        refusal = self.supports(description)
        if refusal is not None:
            raise ConfigError("description", str(description), refusal)
        epilogue = description.epilogue or Epilogue()
        narrow = description.dtype != torch.float32
        lines = epilogue.cpp_lines("value", "m", "row")
        text = _TEXT.format(
            element=CPP_TYPES[description.dtype],
            weight=CPP_TYPES[description.weight_dtype or description.dtype],
            result=CPP_TYPES[epilogue.dtype or description.dtype],
            vectors=description.form or "1",
            parameters="".join(f", {p}" for p in epilogue.cpp_parameters()),
            epilogue="".join(f"            {line}\n" for line in lines),
            read=_WIDEN if narrow else "",
            vector="wide, columns" if narrow else "x, x_stride",
        )
        url = _SOURCE if description.weight_dtype == torch.int8 else ""
        text = config.defines() + inline_headers(text)
        return provenance(description, "codegen.cpp_kernels.gemv", url, text)


def gemv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epilogue: Epilogue | None = None,
    operands: Sequence[Tensor] = (),
    threads: int | None = None,
    isa: str = "native",
) -> Tensor:
    """`linear(x, scale · weight, bias)` for a few vectors, in the dtype of x or of the epilogue.

    Args:
        x: [..., in_size], at most eight vectors, float32 or bfloat16.
        weight: [out_size, in_size], float32, bfloat16 or int8.
        scale: [out_size], float32; with int8 weights, and only with them (`quantize_rows`).
        bias: [out_size], of x's dtype.
        epilogue: pointwise work on the result [vectors, out_size], with its operands.
        threads: torch's number of threads unless given.
        isa: a key of `compiler.ISAS`.

    Raises:
        InputError: a tensor of another shape, dtype or device.
        ConfigError: no compiler.
    """
    out_size, in_size = _checked(x, weight, scale, bias)
    vectors = x.shape[:-1].numel()
    flat = x.reshape(vectors, in_size)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    dtype = (epilogue.dtype if epilogue else None) or x.dtype
    out = x.new_empty((vectors, out_size), dtype=dtype)
    if out.numel() == 0:
        return out.view(*x.shape[:-1], out_size)
    scratch = flat if x.dtype == torch.float32 else x.new_empty(flat.shape, dtype=torch.float32)
    extra = epilogue.launch_arguments(operands, vectors, out_size) if epilogue else []
    most = threads or torch.get_num_threads()

    def run(config: SweepConfig) -> None:
        _entry(x.dtype, weight.dtype, vectors, epilogue, isa, config)(
            flat.data_ptr(),
            flat.stride(0),
            weight.data_ptr(),
            weight.stride(0),
            None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            out_size,
            out_size,
            in_size,
            scratch.data_ptr(),
            config.threads or most,
            *(e.data_ptr() if isinstance(e, Tensor) else e for e in extra),
        )

    if current() is None:
        run(DEFAULT)
    else:
        problem = _problem(x, weight, vectors, epilogue, most, isa)
        run(choose(problem, candidates(most), DEFAULT, lambda c: least_seconds(lambda: run(c))))
    return out.view(*x.shape[:-1], out_size)


def reference(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """What `gemv` means, in fp32, rounded once at the end."""
    product = x.float() @ weight.float().T
    product = product if scale is None else product * scale
    return (product if bias is None else product + bias.float()).to(x.dtype)


def cost(x: Tensor, weight: Tensor) -> Cost:
    """Of one call: the weights are read once."""
    vectors, (out_size, in_size) = x.numel() // x.shape[-1], weight.shape
    activations = vectors * (in_size + out_size) * x.element_size()
    scales = 4 * out_size * (weight.dtype == torch.int8)
    moved = weight.numel() * weight.element_size() + activations + scales
    return Cost(2.0 * vectors * out_size * in_size, float(moved), 1)


def _checked(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> tuple[int, int]:
    """out_size and in_size. Written for few calls: on small matrices they are what costs."""
    if weight.dim() != 2 or weight.dtype not in CPP_TYPES:
        _refuse("weight", weight, "a float32, bfloat16 or int8 matrix")
    out_size, in_size = weight.shape
    if weight.stride(1) != 1 and in_size > 1:
        _refuse("weight", weight, "a matrix with adjacent columns")
    shape = x.shape
    if x.dtype not in _ACTIVATION_TYPES or not shape or shape[-1] != in_size:
        _refuse("x", x, f"float32 or bfloat16 with a last dimension of {in_size}")
    if shape[:-1].numel() > MAX_VECTORS:
        _refuse("x", x, f"at most {MAX_VECTORS} vectors")
    if not (x.is_cpu and weight.is_cpu):
        raise InputError("device is not allowed: all tensors on the CPU")
    if (scale is not None) != (weight.dtype == torch.int8):
        raise InputError("scale is not allowed: one for each row of int8 weights, none for others")
    if scale is not None:
        _check_row_numbers("scale", scale, out_size, torch.float32)
    if bias is not None:
        _check_row_numbers("bias", bias, out_size, x.dtype)
    return out_size, in_size


def _check_row_numbers(name: str, tensor: Tensor, out_size: int, dtype: torch.dtype) -> None:
    adjacent = tensor.shape == (out_size,) and tensor.is_contiguous()
    if tensor.dtype != dtype or not adjacent or not tensor.is_cpu:
        _refuse(name, tensor, f"{out_size} adjacent numbers on the CPU, {dtype_name(dtype)}")


def _refuse(name: str, tensor: Tensor, allowed: str) -> None:
    told = f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)}"
    raise InputError(f"{name}={told} is not allowed: {allowed}")


def _epilogue_refusal(epilogue: Epilogue | None) -> str | None:
    dtypes = [] if epilogue is None else [o.dtype for o in epilogue.operands] + [epilogue.dtype]
    if torch.float16 in dtypes:
        return "epilogue: reads or gives float16: float32 or bfloat16"
    return None


def _described(
    dtype: torch.dtype, weight_dtype: torch.dtype, vectors: int, epilogue: Epilogue | None
) -> KernelDescription:
    form = "" if vectors == 1 else str(vectors)
    return KernelDescription(
        operator="gemv", dtype=dtype, weight_dtype=weight_dtype, form=form, epilogue=epilogue
    )


def _problem(
    x: Tensor, weight: Tensor, vectors: int, epilogue: Epilogue | None, threads: int, isa: str
) -> Problem:
    shape = {"rows": weight.shape[0], "columns": weight.shape[1], "vectors": vectors}
    sizes = {"element_bytes": x.element_size(), "weight_bytes": weight.element_size()}
    text = _default_text(x.dtype, weight.dtype, vectors, epilogue)
    return Problem("gemv cpu", text, {**shape, **sizes}, f"{machine()} {isa} threads={threads}")


@functools.cache
def _default_text(
    dtype: torch.dtype, weight_dtype: torch.dtype, vectors: int, epilogue: Epilogue | None
) -> str:
    return Gemv().source(_described(dtype, weight_dtype, vectors, epilogue))


@functools.cache
def _entry(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    vectors: int,
    epilogue: Epilogue | None,
    isa: str,
    config: SweepConfig,
) -> ctypes._NamedFuncPointer:
    description = _described(dtype, weight_dtype, vectors, epilogue)
    function = compile_library(Gemv().configured_source(description, config), isa=isa).gemv
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    operands = len(epilogue.operands) if epilogue else 0
    function.argtypes = [
        *(pointer, size, pointer, size, pointer, pointer, pointer, size, size, size, pointer),
        ctypes.c_int,
        *([pointer, size, size] * operands),
    ]
    function.restype = None
    return function
