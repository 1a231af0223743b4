"""Sub-graphs that depend on positions alone: find, run on random positions, clone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from rewriter.errors import RewriteError
from rewriter.program import Program
from rewriter.raising.evaluate import SHAPE_ONLY, SIZE_QUERIES, concrete_shape, depends_on, needed

__all__ = ["POSITIONS", "clone_positions", "is_table", "random_positions"]

aten = torch.ops.aten

POSITIONS = "position_ids"
"""The placeholder that carries true positions."""

_RANGES = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})


def is_table(
    node: fx.Node, depends: dict[fx.Node, frozenset[str]], ranged: dict[fx.Node, bool]
) -> bool:
    """Whether the node is a tensor that varies with positions and with nothing else.

    Args:
        depends, ranged: caches, shared over the calls on an unchanged graph.
    """
    if not isinstance(node.meta.get("val"), Tensor) or depends_on(node, depends) - {POSITIONS}:
        return False
    return bool(depends[node]) or _has_range(node, ranged)


def _has_range(node: fx.Node, ranged: dict[fx.Node, bool]) -> bool:
    """Whether positions counted by the graph itself (`arange`) are among the node's ancestors."""
    for current in needed([node], ranged):
        below = any(ranged.get(operand, False) for operand in current.all_input_nodes)
        ranged[current] = below or _counts(current)
    return ranged[node]


def _counts(node: fx.Node) -> bool:
    """Whether the node counts up to an extent of the input; a constant range does not."""
    return node.target in _RANGES and bool(node.all_input_nodes)


def random_positions(
    program: Program, sizes: Mapping[str, int], generator: torch.Generator
) -> dict[fx.Node, Tensor]:
    """The positions placeholder bound to random positions that the model can represent."""
    node = program.placeholder(POSITIONS)
    if node is None:
        return {}
    limit = min(program.meta.get("max_positions") or 4096, 4096)
    shape = concrete_shape(node, sizes)
    return {node: torch.randint(0, limit, shape, generator=generator)}


def clone_positions(
    program: Program,
    nodes: Sequence[fx.Node],
    positions: Mapping[fx.Node, fx.Node],
    *,
    before: fx.Node,
) -> list[fx.Node]:
    """Copies of `nodes` (tables) computed at other positions.

    Extents that the sub-graph reads off its inputs follow the new positions: batch size and length
    of `[batch_size, n]` may differ from those of the program's inputs.

    Args:
        nodes: what to compute again; each depends on positions only.
        positions: `{the positions placeholder: node with the new ones, int64 [batch_size, n]}`.
        before: where the copies are inserted; the new positions must come before it.

    Returns:
        The copies, in the order of `nodes`.

    Raises:
        RewriteError: a node depends on more than positions, or counts positions by itself.
    """
    ((old, new),) = positions.items()
    copies: dict[fx.Node, fx.Node] = {old: new}
    with program.graph.inserting_before(before):
        for node in needed(nodes, copies):
            copies[node] = _copy(program.graph, node, copies, old)
    return [copies[node] for node in nodes]


def _copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], old: fx.Node) -> fx.Node:
    if node.op == "placeholder":
        raise RewriteError(f"{node.name} is not a position: tables depend on {old.name} only")
    if _counts(node):
        raise RewriteError(f"{node.name} counts positions by itself instead of reading {old.name}")
    source = node.args[0] if node.args else None
    if node.target in SHAPE_ONLY and source not in copies:
        return _copy_extent(graph, node, copies[old], old)
    copy = graph.node_copy(node, copies.__getitem__)
    copy.meta.pop("val", None)  # its extents were those of the old positions
    return copy


def _copy_extent(graph: fx.Graph, node: fx.Node, new: fx.Node, old: fx.Node) -> fx.Node:
    """The extent of the new positions that is called by the same symbol as the extent read here."""
    extents = [str(extent) for extent in old.meta["val"].shape]
    wanted = str(node.meta.get("val"))
    if node.target not in SIZE_QUERIES or wanted not in extents:
        raise RewriteError(f"{node.name} reads the extent {wanted}, which positions do not have")
    return graph.call_function(aten.sym_size.int, (new, extents.index(wanted)))
