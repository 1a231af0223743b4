"""Matrices of a large and of a small model, times one vector and times a few."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from codegen.cpp_kernels.gemv import cost, gemv, quantize_rows, reference
from cpu_kernels.case import Candidate, Case

__all__ = ["cases"]

SHAPES = ((32768, 4096), (8192, 2048), (2048, 768), (768, 768))
TARGETS = {torch.float32: 0.95, torch.bfloat16: 0.90, torch.int8: 0.80}
LARGE = 2**23
"""Weights above which the targets hold: fewer are in a cache, or the call itself is what costs."""


def cases() -> Iterator[Case]:
    """One vector on all shapes, then 2, 4 and 8 on one."""
    for out_size, in_size in SHAPES:
        for dtype in TARGETS:
            yield _case(out_size, in_size, dtype, 1)
    for vectors in (2, 4, 8):
        for dtype in TARGETS:
            yield _case(8192, 2048, dtype, vectors)


def _case(out_size: int, in_size: int, dtype: torch.dtype, vectors: int) -> Case:
    generator = torch.Generator().manual_seed(out_size)
    narrow = dtype if dtype != torch.int8 else torch.bfloat16
    x = torch.randn(vectors, in_size, generator=generator).to(narrow)
    full = torch.randn(out_size, in_size, generator=generator) / in_size**0.5
    weight, scale = quantize_rows(full) if dtype == torch.int8 else (full.to(dtype), None)
    moved = cost(x, weight).bytes_moved
    tiny = weight[:16], None if scale is None else scale[:16]
    candidates = [
        Candidate("ours", lambda: gemv(x, weight, scale), moved, None, lambda: gemv(x, *tiny)),
        Candidate("torch", _torch(x, weight, scale), moved, None, _torch(x, *tiny)),
    ]
    if dtype == torch.float32:
        candidates.append(
            Candidate("oneDNN", _one_dnn(x, weight), moved, None, _one_dnn(x, tiny[0]))
        )
    return Case(
        kernel="gemv",
        name=f"{out_size}x{in_size} {str(dtype).removeprefix('torch.')} M={vectors}",
        candidates=candidates,
        expected=reference(x, weight, scale),
        tolerance=1e-5 if narrow == torch.float32 else 2e-2,
        buffer=weight,
        target=TARGETS[dtype] if vectors == 1 and weight.numel() >= LARGE else 0.0,
    )


def _torch(x: Tensor, weight: Tensor, scale: Tensor | None) -> Callable[[], Tensor]:
    """PyTorch's own operator; for int8 the weight-only one, whose scales are bfloat16."""
    if scale is None:
        return lambda: linear(x, weight)
    scales = scale.to(x.dtype)
    return lambda: torch.ops.aten._weight_int8pack_mm(x, weight, scales)


def _one_dnn(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """What torch.compile makes of a frozen fp32 linear layer."""
    return lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
