"""Partial attentions over disjoint sets of entries, merged into the attention over all of them.

    peak = max_p lse_p;  out = Σ_p e^(lse_p - peak) part_p / Σ_p e^(lse_p - peak)
    lse = peak + log Σ_p e^(lse_p - peak)

Layout: parts [num_parts, rows, value_dim] and lses fp32 [num_parts, rows], contiguous; out
[rows, value_dim], lse fp32 [rows]. Accumulated in fp32. One program merges `block_m` rows, part by
part, rescaling what it has when a greater lse comes. A part whose lse is -inf has no say, whatever
stands in it; a row of which all are -inf gives zeros and -inf. Bytes moved: everything once.
This is the last step of an attention that was split, so pointwise work on its result goes here.
Source: https://arxiv.org/abs/2402.05099, https://pytorch.org/blog/flash-decoding
"""

# pyright: reportGeneralTypeIssues=false
# What tl.range and tl.min give has other types inside kernels than outside.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels.attention_limits import refusal, require, value_width
from codegen.triton_kernels.checks import FLOATS
from codegen.triton_kernels.generate import Launch, generate, pointer, run
from codegen.triton_kernels.online_softmax import LN_2, LOG2_E
from rewriter.cost.cost import Cost
from rewriter.errors import InputError

__all__ = [
    "CONFIG",
    "MERGE_LSE",
    "MergeConfig",
    "MergeLse",
    "merge_cost",
    "merge_lse",
    "merge_lse_kernel",
    "merge_reference",
]


@dataclass(frozen=True)
class MergeConfig:
    """Tile size of one program.

    Attributes:
        block_m: rows of a tile, a power of two.
    """

    block_m: int = 4
    num_warps: int = 4
    num_stages: int = 2


CONFIG = MergeConfig()
"""Few rows a program, because a decoded token has few in all and every program should find some; four
rows of 128 fp32 values are one 16-byte load for each of 128 threads. Not from timings."""


@triton.jit
def merge_lse_kernel(
    parts: tl.tensor,
    lses: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    num_parts: tl.tensor,
    rows: tl.tensor,
    # +operands
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """Up to BLOCK_M rows of all parts."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    c = tl.arange(0, BLOCK_V)  # [V]
    in_rows = r < rows
    in_tile = in_rows[:, None] & (c < VALUE_DIM)[None, :]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for part in tl.range(num_parts):
        flat = tl.cast(part, tl.int64) * rows + r
        score = tl.load(lses + flat, mask=in_rows, other=float("-inf")) * LOG2_E  # [M]
        seen = score > float("-inf")  # what stands in a part that saw nothing is not read
        values = tl.load(
            parts + flat[:, None] * VALUE_DIM + c[None, :], mask=in_tile & seen[:, None], other=0.0
        ).to(tl.float32)  # [M, V]
        new_peak = tl.maximum(peak, score)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf would be NaN
        weight = tl.exp2(score - base)
        shrink = tl.exp2(peak - base)
        acc = acc * shrink[:, None] + values * weight[:, None]
        total = total * shrink + weight
        peak = new_peak

    any_seen = total > 0.0
    total = tl.where(any_seen, total, 1.0)
    acc = acc / total[:, None]
    # +epilogue: acc [r[:, None], c[None, :]] mask [in_rows[:, None], (c < VALUE_DIM)[None, :]]
    tl.store(out + r[:, None] * VALUE_DIM + c[None, :], acc.to(out.dtype.element_ty), mask=in_tile)
    merged = tl.where(any_seen, (peak + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(lse + r, merged, mask=in_rows)


class MergeLse(Kernel):
    """`merge_lse` as Triton text. Of a description it reads dtype (of the result), weight_dtype (of
    the parts, fp32 unless given), value_dim or head_dim, and epilogue."""

    operator: ClassVar[str] = "merge_lse"
    backend: ClassVar[str] = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel.supports`."""
        return refusal(description, weight_dtypes=FLOATS, epilogue=True)

    def source(self, description: KernelDescription) -> str:
        """See `Kernel.source`."""
        require(self, description)
        width = value_width(description)
        return generate(
            merge_lse_kernel,
            description=description,
            source_url="https://arxiv.org/abs/2402.05099",
            signature={
                "parts": pointer(_part_dtype(description)),
                "lses": pointer(torch.float32),
                "out": pointer(_result_dtype(description)),
                "lse": pointer(torch.float32),
                "num_parts": "i32",
                "rows": "i64",
            },
            constants={
                "VALUE_DIM": width,
                "BLOCK_M": CONFIG.block_m,
                "BLOCK_V": triton.next_power_of_2(width),
            },
            launch=Launch(("cdiv(rows, BLOCK_M)",), CONFIG.num_warps, CONFIG.num_stages),
            epilogue=description.epilogue,
        )


MERGE_LSE = MergeLse()


def _part_dtype(description: KernelDescription) -> torch.dtype:
    return description.weight_dtype or torch.float32


def _result_dtype(description: KernelDescription) -> torch.dtype:
    epilogue = description.epilogue
    return epilogue.dtype if epilogue and epilogue.dtype else description.dtype


def merge_lse(
    description: KernelDescription,
    parts: Tensor,
    lses: Tensor,
    operands: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Merge and apply the description's epilogue.

    Args:
        parts: [num_parts, ..., value_dim], contiguous.
        lses: fp32 [num_parts, ...], contiguous, natural logarithms.
        operands: tensors of the epilogue.

    Returns:
        out [..., value_dim] and lse fp32 [...].

    Raises:
        InputError: shapes or dtypes that are not as described, or strided tensors.
    """
    shape, width = parts.shape[1:], value_width(description)
    expected = _part_dtype(description)
    if parts.dtype != expected or lses.dtype != torch.float32:
        raise InputError(f"parts {parts.dtype}, lses {lses.dtype}, allowed: {expected}, float32")
    if lses.shape != parts.shape[:-1] or parts.shape[-1] != width:
        told = f"parts {tuple(parts.shape)}, lses {tuple(lses.shape)}"
        raise InputError(
            f"{told}, allowed: [num_parts, ..., {width}] and the same but for the last"
        )
    if not (parts.is_contiguous() and lses.is_contiguous()):
        raise InputError("parts and lses are strided, allowed: contiguous")
    epilogue = description.epilogue
    out = parts.new_empty(shape, dtype=_result_dtype(description))
    lse = lses.new_empty(shape[:-1])
    rows = lse.numel()
    extra = epilogue.launch_arguments(operands, rows, width) if epilogue else []
    arguments = (parts, lses, out, lse, parts.shape[0], rows, *extra)
    run(MERGE_LSE, description, (triton.cdiv(rows, CONFIG.block_m),), arguments)
    return out, lse


def merge_reference(parts: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, fp32 and without an epilogue."""
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0)).unsqueeze(-1)
    seen = weights > 0
    return (weights * parts.float().masked_fill(~seen, 0.0)).sum(0), lse


def merge_cost(description: KernelDescription, num_parts: int, rows: int) -> Cost:
    """Every part scaled and added, read once; the result written once."""
    width = value_width(description)
    read = _part_dtype(description).itemsize * num_parts * rows * width
    written = rows * (width * _result_dtype(description).itemsize + 4)
    return Cost(3.0 * num_parts * rows * width, read + 4.0 * num_parts * rows + written, 1)
