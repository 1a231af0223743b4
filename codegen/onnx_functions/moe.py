"""Mixture of experts: each expert on the rows that chose it, which may be none."""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.onnx_functions.node import node
from rewriter.dialect.moe import gate

__all__ = ["moe"]


def moe(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    gating: str,
    transposed: bool = False,
    limit: float = 0.0,
) -> Tensor:
    """`rewriter::moe`, one expert after the other: NonZero finds its rows, ScatterND adds them up.

    How many rows that are is unknown when tracing, where it passes for all.
    """
    if not transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    out = torch.zeros_like(x)
    for expert in range(up.shape[0]):
        chosen = expert_index == expert
        share = torch.where(chosen, expert_weight, 0).sum(1, keepdim=True)
        rows = _rows(chosen.any(1))
        inner = _gathered(x, rows) @ up[expert]
        inner = inner if up_bias is None else inner + up_bias[expert]
        result = gate(inner, activation, gating, limit) @ down[expert]
        result = result if down_bias is None else result + down_bias[expert]
        weighted = (result * _gathered(share, rows)).to(x.dtype)
        out = node("ScatterND", (out, rows, weighted), x.shape, x.dtype, reduction="add")
    return out


def _rows(chosen: Tensor) -> Tensor:
    """int64 [rows, 1]: where bool [tokens] is true."""
    found = node("NonZero", (chosen,), (1, chosen.shape[0]), torch.int64)
    return found.transpose(0, 1)


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    return node("GatherND", (x, rows), x.shape, x.dtype)
