"""Norms, gated activation, rotary append and the merge of parts: one decode step's small kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from codegen.cpp_kernels import gated_activation, merge_lse, rms_norm, rotary_append
from codegen.kernel import KernelDescription
from cpu_kernels.case import Candidate, Case

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """In fp32, widths of a model of 7 billion parameters."""
    yield _norm()
    yield _gated()
    yield _rotary()
    yield _merge()


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _pair(
    name: str,
    ours: Callable[[], Tensor],
    torchs: Callable[[], Tensor],
    moved: float,
    buffer: Tensor,
) -> Case:
    candidates = [Candidate("ours", ours, moved), Candidate("torch", torchs, moved)]
    return Case("pointwise", name, candidates, torchs(), 1e-5, buffer)


def _norm() -> Case:
    x, residual, weight = _normal(64, 4096), _normal(64, 4096) + 1, _normal(4096)
    d = KernelDescription(operator="rms_norm")
    return _pair(
        "rms_norm with residual, 64x4096",
        lambda: rms_norm.rms_norm(d, x, weight, None, residual, eps=1e-5)[0],
        lambda: functional.rms_norm(x + residual, (4096,), weight, 1e-5),
        rms_norm.cost(x, residual=True).bytes_moved,
        x,
    )


def _gated() -> Case:
    gate, up = _normal(64, 11008), _normal(64, 11008)
    d = KernelDescription(operator="gated_activation", form="silu")
    return _pair(
        "silu(gate) * up, 64x11008",
        lambda: gated_activation.gated_activation(d, gate, up),
        lambda: functional.silu(gate) * up,
        gated_activation.cost(gate).bytes_moved,
        gate,
    )


def _rotary() -> Case:
    q, k, v = _normal(16, 32, 1, 128), _normal(16, 8, 1, 128), _normal(16, 8, 1, 128)
    caches = [torch.zeros(16, 8, 64, 128) for _ in range(2)]
    angles = _normal(16, 1, 64)
    cos, sin, slots = angles.cos(), angles.sin(), torch.full((16, 1), 7)
    d = KernelDescription(operator="rotary_append", form="half")
    return _pair(
        "rotary and append, 16 tokens, 32/8 heads of 128",
        lambda: rotary_append.rotary_append(d, q, k, v, *caches, cos, sin, offset=7),
        lambda: rotary_append.reference(q, k, v, *caches, cos, sin, slots, interleaved=False),
        rotary_append.cost(q, k, v).bytes_moved,
        q,
    )


def _merge() -> Case:
    parts, lse = _normal(8, 512, 128), _normal(8, 512)
    d = KernelDescription(operator="merge_lse")
    return _pair(
        "merge of 8 parts, 512 rows of 128",
        lambda: merge_lse.merge_lse(d, parts, lse)[0],
        lambda: merge_lse.reference(parts, lse)[0],
        merge_lse.cost(parts).bytes_moved,
        parts,
    )
