"""Operators that only look at a tensor in another way."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from codegen.step.value import Refusal, Value

if TYPE_CHECKING:
    from codegen.step.plan import Planner

__all__ = ["VIEWS"]

aten = torch.ops.aten


def _transpose(plan: Planner, node: fx.Node) -> Value:
    x, a, b = node.args
    return plan.tensor(x).transposed(_int(a), _int(b))


def _t(plan: Planner, node: fx.Node) -> Value:
    value = plan.tensor(node.args[0])
    return value if len(value.shape) < 2 else value.transposed(0, 1)


def _permute(plan: Planner, node: fx.Node) -> Value:
    value = plan.tensor(node.args[0])
    order: Any = node.args[1]
    return value.permuted([d % len(value.shape) for d in order])


def _unsqueeze(plan: Planner, node: fx.Node) -> Value:
    return plan.tensor(node.args[0]).unsqueezed(_int(node.args[1]))


def _squeeze(plan: Planner, node: fx.Node) -> Value:
    value = plan.tensor(node.args[0])
    dims: Any = node.args[1] if len(node.args) > 1 else range(len(value.shape))
    return value.squeezed([dims] if isinstance(dims, int) else list(dims))


def _select(plan: Planner, node: fx.Node) -> Value:
    value, dim = plan.tensor(node.args[0]), _int(node.args[1])
    index, extent = plan.extent(node.args[2]), value.shape[dim]
    if not isinstance(index, int) or (index < 0 and not isinstance(extent, int)):
        raise Refusal("an index that is not known")
    return value.selected(dim, index + extent if index < 0 and isinstance(extent, int) else index)


def _slice(plan: Planner, node: fx.Node) -> Value:
    """The result's extent is a fact; only its start has to be worked out."""
    given = dict(enumerate(node.args)) | {
        i: node.kwargs[name] for i, name in enumerate(("self", "dim", "start", "end", "step"))
        if name in node.kwargs
    }  # fmt: skip
    value, dim = plan.tensor(given[0]), _int(given.get(1, 0))
    start, extent = given.get(2), value.shape[dim]
    start = 0 if start is None else plan.extent(start)
    if isinstance(start, int) and start < 0:
        if not isinstance(extent, int):
            raise Refusal("counts from the end of a growing dimension")
        start = max(start + extent, 0)
    return value.sliced(dim, start, plan.fact(node).shape[dim], _int(given.get(4, 1)))


def _expand(plan: Planner, node: fx.Node) -> Value:
    return plan.tensor(node.args[0]).expanded(plan.fact(node).shape)


def _reshape(plan: Planner, node: fx.Node) -> Value:
    value, fact = plan.tensor(node.args[0]), plan.fact(node)
    if value.shape == fact.shape:
        return value
    shape = tuple(extent for extent in fact.shape if isinstance(extent, int))
    if len(shape) != len(fact.shape):
        raise Refusal("reshapes a growing dimension")
    viewed = value.reshaped(shape)
    if viewed is not None:
        return viewed
    copied = plan.copy(value, node).reshaped(shape)
    assert copied is not None
    return copied


def _split(plan: Planner, node: fx.Node) -> tuple[Value, ...]:
    """Parts along a dimension, whose extents are facts."""
    value = plan.tensor(node.args[0])
    given: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    parts, first = [], 0
    for fact in plan.facts.get(node, ()):
        extent = fact.shape[given]
        if not isinstance(extent, int):
            raise Refusal("splits a growing dimension")
        parts.append(value.sliced(given, first, extent))
        first += extent
    return tuple(parts)


def _unbind(plan: Planner, node: fx.Node) -> tuple[Value, ...]:
    value = plan.tensor(node.args[0])
    dim = _int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))
    return tuple(value.selected(dim, i) for i in range(value.fixed_shape[dim]))


def _getitem(plan: Planner, node: fx.Node) -> Value:
    source, index = node.args
    parts = plan.values.get(source) if isinstance(source, fx.Node) else None
    if not isinstance(parts, tuple):
        raise Refusal("a part of what PyTorch gives")
    return parts[_int(index)]


def _same(plan: Planner, node: fx.Node) -> Value:
    return plan.tensor(node.args[0])


def _contiguous(plan: Planner, node: fx.Node) -> Value:
    return plan.contiguous(node.args[0])


def _int(argument: Any) -> int:
    if not isinstance(argument, int):
        raise Refusal(f"{argument} is not a constant")
    return argument


VIEWS: dict[Any, Callable[[Planner, fx.Node], Value | tuple[Value, ...]]] = {
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.expand.default: _expand,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    operator.getitem: _getitem,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.contiguous.default: _contiguous,
    aten.clone.default: _contiguous,
}
"""Views by operator. What they cannot tell raises Refusal."""
