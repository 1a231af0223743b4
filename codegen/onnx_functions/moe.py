"""Mixture of experts as a loop over those that some token chose.

ONNX has no such operator. `moe` stands for the whole in a traced graph; `ExpertStep` is what one turn of
the loop does, traced by itself: NonZero finds the rows of an expert, ScatterND adds them up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from codegen.onnx_functions.node import node
from rewriter.dialect.moe import gate

__all__ = ["EXPERTS", "ExpertStep", "moe"]

EXPERTS = "Experts"
"""The operator that stands for the loop until the graph is complete, in the domain `rewriter`."""


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
    """`rewriter::moe`; biases that are absent are not among the inputs."""
    biases = [bias for bias in (up_bias, down_bias) if bias is not None]
    return node(
        f"rewriter::{EXPERTS}",
        (x, expert_index, expert_weight.to(x.dtype), up, down, *biases),
        x.shape,
        x.dtype,
        activation=activation,
        gating=gating,
        transposed=int(transposed),
        limit=limit,
        up_bias=int(up_bias is not None),
        down_bias=int(down_bias is not None),
    )


class ExpertStep(nn.Module):
    """One expert's share of the sum, for the rows that chose it.

    How many rows that are is unknown when tracing, where all pass for them.

    Args:
        options: the attributes of `moe`'s operator.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        total: Tensor,
        expert: Tensor,
        x: Tensor,
        expert_index: Tensor,
        expert_weight: Tensor,
        up: Tensor,
        down: Tensor,
        first_bias: Tensor | None = None,
        second_bias: Tensor | None = None,
    ) -> Tensor:
        """total [tokens, hidden_size] and what the expert, int64 [], adds; the rest as of `moe`."""
        chosen = expert_index == expert
        share = torch.where(chosen, expert_weight, 0).sum(1, keepdim=True)
        found = node("NonZero", (chosen.any(1),), (1, x.shape[0]), torch.int64)
        rows = found.transpose(0, 1)
        pending = [bias for bias in (first_bias, second_bias) if bias is not None]
        inner = _gathered(x, rows) @ self._weight(up, expert)
        if self.options["up_bias"]:
            inner = inner + _one(pending.pop(0), expert)
        inner = gate(inner, *(self.options[name] for name in ("activation", "gating", "limit")))
        out = inner @ self._weight(down, expert)
        if self.options["down_bias"]:
            out = out + _one(pending.pop(0), expert)
        weighted = (out * _gathered(share, rows)).to(x.dtype)
        return node("ScatterND", (total, rows, weighted), x.shape, x.dtype, reduction="add")

    def _weight(self, weights: Tensor, expert: Tensor) -> Tensor:
        weight = _one(weights, expert)
        return weight if self.options["transposed"] else weight.transpose(0, 1)


def _one(values: Tensor, expert: Tensor) -> Tensor:
    """values[expert]."""
    return node("Gather", (values, expert), values.shape[1:], values.dtype, axis=0)


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    return node("GatherND", (x, rows), x.shape, x.dtype)
