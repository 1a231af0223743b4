"""Dialect operators whose references look at values or call other operators, as plain PyTorch.

What is exported has to be traced for all sizes at once, and to run where this package is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.nn import functional

from rewriter.dialect.linear import linear_op
from rewriter.dialect.moe import gate, moe
from rewriter.errors import ExportError

__all__ = ["PLAIN", "demand_aten"]

NAMESPACES = frozenset({"aten", "prims", "mkldnn", "onednn"})
"""Of operators that come with libtorch."""


def dense_moe(
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
    """`rewriter::moe` computed by every expert for every token, those not chosen weighing 0.

    The same arguments. How many tokens an expert gets is a value, which a trace does not have.
    """
    if not transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, expert_weight.dtype))
    for expert in range(up.shape[0]):
        inner = x @ up[expert]
        inner = inner if up_bias is None else inner + up_bias[expert]
        result = gate(inner, activation, gating, limit) @ down[expert]
        result = result if down_bias is None else result + down_bias[expert]
        share = (expert_weight * (expert_index == expert)).sum(-1, keepdim=True)
        out = out + result * share
    return out.to(x.dtype)


PLAIN: dict[Any, Callable[..., Any]] = {
    moe.overload: dense_moe,
    linear_op.overload: functional.linear,
}
"""By operator, in the place of its reference."""


def demand_aten(exported: ExportedProgram) -> ExportedProgram:
    """The same program without operators of the dialect.

    Raises:
        ExportError: it calls an operator that libtorch does not come with.
    """
    for node in exported.graph.nodes:
        if node.target is linear_op.overload:
            node.target = torch.ops.aten.linear.default
    exported.graph_module.recompile()
    for node in exported.graph.nodes:
        if _is_foreign(node):
            raise ExportError(f"{node.target} at {node.name} is not ATen: the .pt2 would need it")
    return exported


def _is_foreign(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in NAMESPACES
