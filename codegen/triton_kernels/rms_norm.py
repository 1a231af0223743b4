"""Root-mean-square normalisation of rows, with the residual added before it where asked.

    wide = x + residual
    out  = epilogue(wide / sqrt(mean(wide²) + eps) · (weight_offset + weight))

Layouts: x, residual, summed and out [rows, width], any row strides, columns contiguous; weight
[width]. Forms, joined by commas: `residual` adds one and also stores the sum, rounded to x's dtype, in
`summed` (which is then what is normalised, as if two operators had run); `wide` multiplies by the
weight before rounding to x's dtype, as Gemma and the dialect's `wide_weight` do; without it the
normalised row is rounded first. One program computes one row in one tile. Sums are fp32.
Bytes moved: x and out once; with a residual two more. Source: https://arxiv.org/abs/1910.07467
"""

from __future__ import annotations

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
from codegen.triton_kernels.tuned import TunedKernel, config_of_launch
from rewriter.cost.cost import Cost
from rewriter.errors import InputError

__all__ = ["RMS_NORM", "NormConfig", "rms_norm", "rms_norm_cost", "rms_norm_reference"]

FORMS = ("", "residual", "wide", "residual,wide")
MAX_WIDTH = 16384


@dataclass(frozen=True)
class NormConfig:
    """How a row is spread over threads: `num_warps` by the width of its tile."""

    num_warps: int

    @staticmethod
    def of(block: int) -> NormConfig:
        """About 16 values for each thread, in 1 to 16 warps; a row of registers, not timed."""
        return NormConfig(max(1, min(16, block // 512)))


@triton.jit
def rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,  # read where RESIDUAL
    weight: tl.tensor,
    summed: tl.tensor,  # written where RESIDUAL
    out: tl.tensor,
    eps: float,
    weight_offset: float,
    x_row: int,
    residual_row: int,
    summed_row: int,
    out_row: int,
    # +operands
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """See the module."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)  # [W]
    live = c < WIDTH
    wide = tl.load(x + row * x_row + c, mask=live, other=0.0).to(tl.float32)
    if RESIDUAL:
        wide += tl.load(residual + row * residual_row + c, mask=live, other=0.0).to(tl.float32)
        total = wide.to(summed.dtype.element_ty)
        tl.store(summed + row * summed_row + c, total, mask=live)
        wide = total.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / WIDTH
    acc = wide * tl.rsqrt(mean + eps)
    if not WIDE:
        acc = acc.to(x.dtype.element_ty).to(tl.float32)
    acc *= weight_offset + tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    # +epilogue: acc [row, c] mask [True, live]
    tl.store(out + row * out_row + c, acc.to(out.dtype.element_ty), mask=live)


class RmsNorm(TunedKernel[NormConfig]):
    """`head_dim` is the width of a row, `form` one of `FORMS`."""

    operator = "rms_norm"
    backend = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel`."""
        refusal = float_refusal(description) or one_of("form", description.form, FORMS)
        if refusal is None and not 1 <= description.head_dim <= MAX_WIDTH:
            return f"head_dim={description.head_dim}, allowed: 1 to {MAX_WIDTH}, the width of a row"
        return refusal or one_of(
            "weight_dtype", description.weight_dtype, (None, description.dtype, torch.float32)
        )

    def config_for(self, description: KernelDescription) -> NormConfig:
        """See `TunedKernel`."""
        return NormConfig.of(triton.next_power_of_2(description.head_dim))

    def candidates(self, description: KernelDescription) -> tuple[NormConfig, ...]:
        """See `TunedKernel`."""
        return tuple(NormConfig(warps) for warps in (1, 2, 4, 8, 16, 32))

    def configured_source(self, description: KernelDescription, config: NormConfig) -> str:
        """See `TunedKernel`."""
        epilogue, wide = description.epilogue, pointer(description.dtype)
        dtype = epilogue.dtype if epilogue and epilogue.dtype else description.dtype
        block = triton.next_power_of_2(description.head_dim)
        strides = ("x_row", "residual_row", "summed_row", "out_row")
        aligned = "i64:16" if description.head_dim % 16 == 0 else "i64"
        return generate(
            rms_norm_kernel,
            description=description,
            source_url="https://arxiv.org/abs/1910.07467",
            signature={
                **dict.fromkeys(("x", "residual", "summed"), wide),
                "weight": pointer(description.weight_dtype or description.dtype),
                "out": pointer(dtype),
                **dict.fromkeys(("eps", "weight_offset"), "fp32"),
                **dict.fromkeys(strides, aligned),
            },
            constants={
                "WIDTH": description.head_dim,
                "BLOCK": block,
                "RESIDUAL": "residual" in description.form,
                "WIDE": "wide" in description.form,
            },
            launch=Launch(("rows",), config.num_warps, 1),
            epilogue=epilogue,
        )


RMS_NORM = RmsNorm()


def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    wide_weight: bool = False,
    epilogue: Epilogue | None = None,
    operands: Sequence[Tensor] = (),
    config: NormConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise x [rows, width], or x + residual.

    Args:
        weight: [width] of x's dtype or fp32.
        weight_offset: added to the weight; other than 0 it implies `wide_weight`.
        wide_weight: multiply by the weight before rounding.
        config: None = by the rule of `codegen.tuning`.

    Returns:
        the normalised rows and x + residual (x itself without one).

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    rows, width = rows_of("x", x)
    if weight.shape != (width,) or not weight.is_contiguous():
        raise InputError(f"weight: contiguous [{width}] is expected, not {tuple(weight.shape)}")
    if residual is not None:
        same_dtype("residual", residual, x)
        if rows_of("residual", residual) != (rows, width):
            raise InputError(f"residual: {tuple(residual.shape)} beside x {tuple(x.shape)}")
    wide = wide_weight or weight_offset != 0
    parts = (("residual", residual is not None), ("wide", wide))
    description = KernelDescription(
        operator="rms_norm",
        dtype=x.dtype,
        weight_dtype=weight.dtype if weight.dtype != x.dtype else None,
        head_dim=width,
        form=",".join(name for name, present in parts if present),
        epilogue=epilogue,
    )
    refusal = RMS_NORM.supports(description)
    if refusal is not None:
        raise InputError(refusal)
    dtype = epilogue.dtype if epilogue and epilogue.dtype else x.dtype
    out = x.new_empty((rows, width), dtype=dtype)
    added = x if residual is None else residual
    summed = x if residual is None else x.new_empty((rows, width))
    extra = epilogue.launch_arguments(operands, rows, width) if epilogue else []
    strides = (x.stride(0), added.stride(0), summed.stride(0), out.stride(0))
    tensors = (x, added, weight, summed, out)
    arguments = (*tensors, eps, weight_offset, *strides, *extra)

    def launch(config: NormConfig) -> None:
        run(RMS_NORM, description, (rows,), arguments, config)

    def told() -> dict[str, int]:
        return {"rows": rows, "width": width, "tensors": 2 if residual is None else 4}

    launch(config or config_of_launch(RMS_NORM, description, x.device, told, launch))
    return out, summed


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    wide_weight: bool = False,
    epilogue: Epilogue | None = None,
    operands: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    summed = x if residual is None else x + residual
    wide = summed.float()
    out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if not (wide_weight or weight_offset):
        out = out.to(x.dtype).float()
    out = out * (weight_offset + weight.float())
    out = epilogue.reference(out, operands) if epilogue else out
    return (out if epilogue and epilogue.dtype else out.to(x.dtype)), summed


def rms_norm_cost(x: Tensor, residual: bool) -> Cost:
    """Reads and writes of rows; the weight stays in the cache."""
    passes = 4 if residual else 2
    return Cost(4.0 * x.numel(), float(passes * x.numel() * x.element_size()), 1)
