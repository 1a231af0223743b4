"""Where heads are already side by side, as products with weights give them: no layout changes there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["drop_unchanged", "merged_source", "merged_users"]

aten = torch.ops.aten
RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.contiguous.default,
        aten.clone.default,
        aten.flatten.using_ints,
    }
)
"""Operators that keep the order of the elements."""


def drop_unchanged(graph: fx.Graph) -> None:
    """Chains of reshapes that end in the shape they began with are not there."""
    for node in list(graph.nodes):
        source = _unchanged(node)
        if source is not node and node.users:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def merged_source(node: fx.Node) -> fx.Node | None:
    """What bhsd [b, heads, seq, width] was made of, if it was [b, seq, heads * width]."""
    shape = _shape(node)
    if not _swaps_heads(node) or shape is None:
        return None
    merged = _merged(node)
    current: Any = node.args[0]
    while current.target in RESHAPES and _shape(current) != merged:
        current = current.args[0]
    return current if _shape(current) == merged else None


def merged_users(node: fx.Node) -> list[fx.Node]:
    """Nodes that hold a bhsd value as [b, seq, heads * width]."""
    merged, found = _merged(node), []
    pending = [user for user in node.users if _swaps_heads(user)]
    while pending:
        user = pending.pop()
        if _shape(user) == merged:
            found.append(user)
        else:
            pending += [u for u in user.users if u.target in RESHAPES]
    return found


def _unchanged(node: fx.Node) -> fx.Node:
    """The first of a chain of reshapes that already had the node's shape."""
    shape = _shape(node)
    found: Any = node
    current: Any = node
    while shape is not None and current.target in RESHAPES:
        current = current.args[0]
        if _shape(current) == shape:
            found = current
    return found


def _swaps_heads(node: fx.Node) -> bool:
    dims: Any = node.args[1:]
    if node.target is aten.transpose.int and _shape(node) is not None:
        return {dim % 4 for dim in dims} == {1, 2} and node.meta["val"].dim() == 4
    return node.target is aten.permute.default and list(dims[0]) == [0, 2, 1, 3]


def _merged(node: fx.Node) -> tuple[str, ...]:
    b, heads, seq, width = node.meta["val"].shape
    return str(b), str(seq), str(heads * width)


def _shape(node: fx.Node) -> tuple[str, ...] | None:
    value = node.meta.get("val")
    return tuple(str(extent) for extent in value.shape) if isinstance(value, Tensor) else None
