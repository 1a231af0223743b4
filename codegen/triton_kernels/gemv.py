"""Products of few rows with a weight, as in decoding, read at memory speed.

    out[m, n] = epilogue(scale[n] · Σ_k x[m, k] · weight[n, k])

Layouts: x [rows, in_features], weight [out_features, in_features], out [rows, out_features]; any row
strides, columns contiguous. scale [out_features] fp32 belongs to int8 weights, one for each output.
One program computes all rows of `block_n` outputs, so that the weight is read once. A single row is
multiplied and summed on the vector units; more rows go through the tensor cores, padded to 16.
Accumulation is fp32. Bytes moved: the weight once, x once for each program (from the cache), out once.
Source: https://arxiv.org/abs/2206.01861 (weights of 8 bits beside activations of 16)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.epilogue import Epilogue
from codegen.kernel import KernelDescription
from codegen.triton_kernels.checks import float_refusal, one_of, rows_of, same_dtype
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from codegen.triton_kernels.product import product
from codegen.triton_kernels.tuned import TunedKernel, config_of_launch
from rewriter.cost.cost import Cost
from rewriter.errors import InputError

__all__ = ["CONFIGS", "GEMV", "MAX_ROWS", "GemvConfig", "gemv", "gemv_cost", "gemv_reference"]

MAX_ROWS = 16


@dataclass(frozen=True)
class GemvConfig:
    """How much of the weight one program has in flight.

    Attributes:
        block_n: outputs of a program.
        block_k: inputs of a step.
    """

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3


CONFIGS = {
    "row": GemvConfig(block_n=4, block_k=1024),
    "rows": GemvConfig(block_n=64, block_k=64),
    "rows float32": GemvConfig(block_n=32, block_k=32),  # multiplied without tensor cores
}
"""By form and dtype. Chosen so that nothing spills on sm_80, sm_90 and gfx942 and that 4096 outputs give
each of an H100's 132 SMs several programs (one row) or half of them one (more); not timed."""


@triton.jit
def gemv_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,  # read where SCALED
    out: tl.tensor,
    rows: int,
    in_features: int,
    out_features: int,
    x_row: int,
    weight_row: int,
    out_row: int,
    # +operands
    BLOCK_M: tl.constexpr,  # 1, or 16 for 2 to 16 rows
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """See the module."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [N, 1]
    m = tl.arange(0, BLOCK_M).to(tl.int64)[None, :]  # [1, M]
    k = tl.arange(0, BLOCK_K)
    live_n = n < out_features
    live_m = m < rows
    if BLOCK_M == 1:
        partial = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, in_features, BLOCK_K):
            at = start + k[None, :]  # [1, K]
            live_k = at < in_features
            w = tl.load(weight + n * weight_row + at, mask=live_n & live_k, other=0.0)  # [N, K]
            v = tl.load(x + at, mask=live_k, other=0.0)  # [1, K]
            partial += w.to(tl.float32) * v.to(tl.float32)
        acc = tl.sum(partial, 1, keep_dims=True)  # [N, 1]
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, in_features, BLOCK_K):
            at = start + k
            live_k = at < in_features
            mask_w = live_n & live_k[None, :]
            w = tl.load(weight + n * weight_row + at[None, :], mask=mask_w, other=0.0)  # [N, K]
            mask_v = live_m & live_k[:, None]
            v = tl.load(x + m * x_row + at[:, None], mask=mask_v, other=0.0)  # [K, M]
            acc += product(w.to(tl.float32).to(v.dtype), v)
    if SCALED:
        acc *= tl.load(scale + n, mask=live_n, other=0.0)
    # +epilogue: acc [m, n] mask [live_m, live_n]
    tl.store(out + m * out_row + n, acc.to(out.dtype.element_ty), mask=live_m & live_n)


def config_for(description: KernelDescription) -> GemvConfig:
    """The tiles of a description."""
    wide = description.form == "rows" and description.dtype == torch.float32
    return CONFIGS["rows float32" if wide else description.form]


class Gemv(TunedKernel[GemvConfig]):
    """`form` is `"row"` (one) or `"rows"` (2 to 16); `weight_dtype` int8 has a scale for each output."""

    operator = "gemv"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        refusal = float_refusal(description) or one_of("form", description.form, ("row", "rows"))
        allowed = (None, description.dtype, torch.int8)
        return refusal or one_of("weight_dtype", description.weight_dtype, allowed)

    def config_for(self, description: KernelDescription) -> GemvConfig:
        """See `TunedKernel`."""
        return config_for(description)

    def candidates(self, description: KernelDescription) -> tuple[GemvConfig, ...]:
        """See `TunedKernel`; stages are of products by tensor cores, which one row does not use."""
        if description.form == "row":
            tiles = itertools.product((1, 2, 4, 8, 16), (256, 512, 1024, 2048), (2, 4, 8))
            return tuple(GemvConfig(*t) for t in tiles if 1024 <= t[0] * t[1] <= 16384)
        tiles = itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (4, 8), (2, 3, 4))
        return tuple(GemvConfig(*t) for t in tiles if 1024 <= t[0] * t[1] <= 16384)

    def configured_source(self, description: KernelDescription, config: GemvConfig) -> str:
        """See `TunedKernel`."""
        wide = pointer(description.dtype)
        epilogue = description.epilogue
        out = epilogue.dtype if epilogue and epilogue.dtype else description.dtype
        return generate(
            gemv_kernel,
            description=description,
            source_url="https://arxiv.org/abs/2206.01861",
            signature={
                "x": wide,
                "weight": pointer(description.weight_dtype or description.dtype),
                "scale": pointer(torch.float32),
                "out": pointer(out),
                **dict.fromkeys(("rows", "out_features"), "i32"),
                **dict.fromkeys(("in_features", "x_row", "weight_row", "out_row"), "i64:16"),
            },
            constants={
                "BLOCK_M": 1 if description.form == "row" else MAX_ROWS,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "SCALED": description.weight_dtype == torch.int8,
            },
            launch=Launch(("cdiv(out_features, BLOCK_N)",), config.num_warps, config.num_stages),
            epilogue=epilogue,
        )


GEMV = Gemv()


def gemv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    epilogue: Epilogue | None = None,
    operands: Sequence[Tensor] = (),
    config: GemvConfig | None = None,
) -> Tensor:
    """x [rows, in_features] times weightᵀ, then the epilogue on [rows, out_features].

    Args:
        x: 1 to 16 rows of fp32, bf16 or fp16.
        weight: [out_features, in_features] of x's dtype, or int8 with `scale`.
        scale: fp32 [out_features].
        config: None = by the rule of `codegen.tuning`.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    rows, in_features = rows_of("x", x)
    out_features, width = rows_of("weight", weight)
    if not rows <= MAX_ROWS:
        raise InputError(f"x: {rows} rows; at most {MAX_ROWS}")
    if width != in_features:
        raise InputError(f"weight: {width} inputs where x has {in_features}")
    if weight.dtype == torch.int8:
        if scale is None or scale.shape != (out_features,) or scale.dtype != torch.float32:
            raise InputError(f"scale: float32 [{out_features}] is needed with an int8 weight")
    else:
        same_dtype("weight", weight, x)
    description = KernelDescription(
        operator="gemv",
        dtype=x.dtype,
        weight_dtype=weight.dtype if weight.dtype != x.dtype else None,
        form="row" if rows <= 1 else "rows",
        epilogue=epilogue,
    )
    dtype = epilogue.dtype if epilogue and epilogue.dtype else x.dtype
    out = x.new_empty((rows, out_features), dtype=dtype)
    extra = epilogue.launch_arguments(operands, rows, out_features) if epilogue else []
    sizes = (rows, in_features, out_features, x.stride(0), weight.stride(0), out.stride(0))
    tensors = (x, weight, weight if scale is None else scale.contiguous(), out)

    def launch(config: GemvConfig) -> None:
        grid = (triton.cdiv(out_features, config.block_n) if rows else 0,)
        run(GEMV, description, grid, (*tensors, *sizes, *extra), config)

    def told() -> dict[str, int]:
        return {"rows": rows, "in_features": in_features, "out_features": out_features}

    launch(config or config_of_launch(GEMV, description, x.device, told, launch))
    return out


def gemv_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    epilogue: Epilogue | None = None,
    operands: Sequence[Tensor] = (),
) -> Tensor:
    """The same in plain PyTorch."""
    out = x.float() @ weight.float().T
    out = out if scale is None else out * scale
    out = epilogue.reference(out, operands) if epilogue else out
    return out if epilogue and epilogue.dtype else out.to(x.dtype)


def gemv_cost(rows: int, weight: Tensor) -> Cost:
    """One pass over the weight; x and out are small beside it."""
    return Cost(2.0 * rows * weight.numel(), float(weight.numel() * weight.element_size()), 1)
