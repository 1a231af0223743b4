"""One spelling for what traces spell in many ways, so that recognisers see data flow alone.

In place and linear in the number of nodes: operators that return their input (aliases, clones, full
slices, same-dtype casts, dropout at inference, times one, plus zero) go, views become `reshape`,
einsums `matmul`, equal calls are merged (layers then share one mask and one rotary table), and
sizes of one symbol become one node. A traced graph is functional, so a clone is its input; where an
operator mutates, clones stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.program import Program
from rewriter.raising.einsum import lower_einsums
from rewriter.raising.insertion import shape_of

__all__ = ["normalize"]

aten = torch.ops.aten

Rule = Callable[[fx.Node], "fx.Node | None"]
"""The node that a node equals, or None."""

_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default})
_ALIASES = frozenset({aten.alias.default, aten.detach.default, aten.detach_.default})
_SHAPE_KEEPING = frozenset(
    {aten.expand.default, aten.slice.Tensor, aten.reshape.default, aten.view_as.default}
)
_CASTS = frozenset(
    {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default}
)
_ONE_IS_NEUTRAL = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
_ZERO_IS_NEUTRAL = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar})
_SYMBOLIC = frozenset(
    {operator.add, operator.sub, operator.mul, operator.floordiv, operator.getitem}
)


def normalize(program: Program) -> None:
    """Bring the graph of a captured or raised program to normal form, in place."""
    lower_einsums(program)
    graph = program.graph
    rules = _rules(keep_copies=any(_mutates(node) for node in graph.nodes))
    seen: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        _respell(node)
        same = next((found for rule in rules if (found := rule(node)) is not None), None)
        if same is None:
            same = _merged(node, seen)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    program.finish()


def _rules(*, keep_copies: bool) -> tuple[Rule, ...]:
    rules = (_alias, _dropout, _same_shape, _same_dtype, _neutral, _transpose_pair)
    return rules if keep_copies else (_copy, *rules)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _respell(node: fx.Node) -> None:
    """Views become one `reshape`; permuting two dimensions becomes a transpose."""
    if node.target in _VIEWS:
        node.target = aten.reshape.default
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target is aten.reshape.default:
            node.args = (source.args[0], *node.args[1:])
    elif node.target is aten.transpose.int:
        rank = len(shape_of(node))
        first, second = sorted(dim % rank for dim in node.args[1:] if isinstance(dim, int))
        node.args = (node.args[0], first, second)
    elif node.target is aten.permute.default:
        _permute_as_transpose(node)


def _permute_as_transpose(node: fx.Node) -> None:
    order = [dim % len(shape_of(node)) for dim in node.args[1]]  # pyright: ignore
    moved = [position for position, dim in enumerate(order) if position != dim]
    if len(moved) == 2:
        node.target = aten.transpose.int
        node.args = (node.args[0], *moved)


def _source(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) else None


def _alias(node: fx.Node) -> fx.Node | None:
    return _source(node) if node.target in _ALIASES else None


def _copy(node: fx.Node) -> fx.Node | None:
    return _source(node) if node.target in _COPIES else None


def _dropout(node: fx.Node) -> fx.Node | None:
    if node.target is not aten.dropout.default:
        return None
    return _source(node) if node.args[1] == 0 or node.args[2] is False else None


def _same_shape(node: fx.Node) -> fx.Node | None:
    """A full slice, an expansion or a reshape to the shape it has, and a permutation of nothing."""
    source = _source(node)
    if source is None:
        return None
    if node.target is aten.permute.default:
        return source if list(node.args[1]) == list(range(len(shape_of(node)))) else None  # pyright: ignore
    if node.target is aten.slice.Tensor and len(node.args) > 4 and node.args[4] != 1:
        return None
    known = node.target in _SHAPE_KEEPING and "val" in node.meta and "val" in source.meta
    return source if known and shape_of(node) == shape_of(source) else None


def _same_type(node: fx.Node, source: fx.Node) -> bool:
    first, second = node.meta.get("val"), source.meta.get("val")
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.dtype == second.dtype and first.device == second.device


def _same_dtype(node: fx.Node) -> fx.Node | None:
    source = _source(node)
    if node.target not in _CASTS or source is None:
        return None
    return source if _same_type(node, source) else None


def _neutral(node: fx.Node) -> fx.Node | None:
    """x·1, x/1, x+0 and x-0 of an unchanged dtype."""
    source = _source(node)
    if source is None or len(node.args) != 2 or "rounding_mode" in node.kwargs:
        return None
    other = node.args[1]
    if isinstance(other, bool) or not isinstance(other, int | float):
        return None
    one, zero = node.target in _ONE_IS_NEUTRAL, node.target in _ZERO_IS_NEUTRAL
    if not ((one and other == 1) or (zero and other == 0)):
        return None
    return source if _same_type(node, source) else None


def _transpose_pair(node: fx.Node) -> fx.Node | None:
    source = _source(node)
    if node.target is not aten.transpose.int or source is None or source.target is not node.target:
        return None
    inner = _source(source)
    return inner if source.args[1:] == node.args[1:] else None


def _merged(node: fx.Node, seen: dict[Hashable, fx.Node]) -> fx.Node | None:
    """The first node that computes the same, recorded for the next."""
    key = _key(node)
    if key is None:
        return None
    return seen.setdefault(key, node)


def _key(node: fx.Node) -> Hashable:
    """Equal keys compute equal values; None for a node that must not be merged."""
    if node.op == "get_attr":
        return ("get_attr", node.target)
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt) and value.node.expr.free_symbols:
        return ("size", value.node.expr)
    if not _pure(node):
        return None
    return (node.target, _frozen(node.args), _frozen(node.kwargs))


def _pure(node: fx.Node) -> bool:
    if node.target in _SYMBOLIC:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def _frozen(value: Any) -> Hashable:
    """Hashable form in which 1, 1.0 and True differ."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _frozen((value.start, value.stop, value.step)))
    if isinstance(value, bool | int | float | complex):
        return (type(value).__name__, repr(value))
    return value
