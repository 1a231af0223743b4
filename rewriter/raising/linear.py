"""One view of every spelling of a linear projection, and views of its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewriter.engine.site import bound_arguments
from rewriter.program import Program

__all__ = ["Linear", "as_linear", "view_of"]

aten = torch.ops.aten

_END = 2**63 - 1


@dataclass(frozen=True)
class Linear:
    """x @ weightᵀ + bias.

    Attributes:
        node: the call; x: its input [..., in]; bias: [out] or None.
        weight: [out, in], or [in, out] where `transposed`.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool

    def weight_part(self, program: Program, part: slice) -> fx.Node:
        """Rows `part` of the weight as [out, in]: a view, nothing is copied."""
        weight = view_of(program, self.weight, aten.t.default) if self.transposed else self.weight
        return _rows(program, weight, part)

    def bias_part(self, program: Program, part: slice) -> fx.Node | None:
        """The same part of the bias."""
        return None if self.bias is None else _rows(program, self.bias, part)


def as_linear(node: fx.Node) -> Linear | None:
    """The node as a projection by one matrix; None if it is something else."""
    if node.target is aten.linear.default:
        values = bound_arguments(node)
        return Linear(node, values["input"], values["weight"], values["bias"], False)
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
        return _projection(node, x, weight, bias)
    if node.target in (aten.mm.default, aten.matmul.default):
        return _projection(node, node.args[0], node.args[1], None)
    return None


def _projection(node: fx.Node, x: Any, weight: Any, bias: Any) -> Linear | None:
    """A product with a weight [in, out], or with the transpose of one [out, in]."""
    if bias is not None and bias.meta["val"].dim() != 1:
        return None
    if weight.op == "get_attr" and weight.meta["val"].dim() == 2:
        return Linear(node, x, weight, bias, True)
    if _swaps(weight) and weight.args[0].op == "get_attr":
        return Linear(node, x, weight.args[0], bias, False)
    return None


def _swaps(node: fx.Node) -> bool:
    """Whether the node transposes a matrix."""
    if node.target is aten.t.default:
        return True
    if node.target is aten.transpose.int:
        return node.meta["val"].dim() == 2
    return node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # pyright: ignore


def _rows(program: Program, node: fx.Node, part: slice) -> fx.Node:
    if part == slice(None):
        return node
    stop = _END if part.stop is None else part.stop
    return view_of(program, node, aten.slice.Tensor, 0, part.start or 0, stop, part.step or 1)


def view_of(program: Program, node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A call on `node` right after it, or the same call if it was put there already."""
    for user in node.users:
        if user.target is target and user.args == (node, *args) and "raised_from" in user.meta:
            return user
    with program.graph.inserting_after(node):
        new = program.graph.call_function(target, (node, *args))
    new.meta = {**node.meta, "raised_from": node.name, "val": target(node.meta["val"], *args)}
    return new
