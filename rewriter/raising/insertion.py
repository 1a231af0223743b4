"""Insert calls into a traced graph with the metadata that the rest of the compiler reads."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.program import Program
from rewriter.raising.evaluate import attribute

__all__ = ["Inserter", "NoExtent", "shape_of"]

aten = torch.ops.aten


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Extents of the node's tensor, symbolic ones as expressions; () when it is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return tuple(e.node.expr if isinstance(e, torch.SymInt) else int(e) for e in value.shape)


class NoExtent(Exception):
    """A shape needs an extent that no node at the place has."""


class Inserter:
    """Inserts nodes before one node, with its source metadata and with values computed on fakes."""

    def __init__(self, program: Program, before: fx.Node) -> None:
        self.program, self.before = program, before
        self.inserted: list[fx.Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call, its `meta["val"]` included."""
        return self._insert(target, args, kwargs, None)

    def _insert(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> fx.Node:
        with self.program.graph.inserting_before(self.before):
            node = self.program.graph.call_function(target, args, kwargs)
        node.meta = {
            k: v for k, v in self.before.meta.items() if k in ("stack_trace", "nn_module_stack")
        }
        node.meta["raised_from"] = self.before.name
        node.meta["val"] = self._fake_result(node) if value is None else value
        self.inserted.append(node)
        return node

    def attribute(self, name: str) -> fx.Node:
        """A parameter or buffer of the program's module."""
        with self.program.graph.inserting_before(self.before):
            node = self.program.graph.get_attr(name)
        self._fake_attribute(node)
        self.inserted.append(node)
        return node

    def discard(self) -> None:
        """Take back what was inserted and is not used by the rest of the graph."""
        for node in reversed(self.inserted):
            if not node.users:
                self.program.graph.erase_node(node)

    def permute(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        """x with its dimensions in another order; itself when the order is the same."""
        moved = [position for position, dim in enumerate(order) if position != dim]
        if not moved:
            return x
        if len(moved) == 2:
            return self.transpose(x, *moved)
        if x.target is aten.transpose.int or x.target is aten.permute.default:
            source, first = x.args[0], _permutation(x)
            return self.permute(source, [first[dim] for dim in order])  # pyright: ignore
        return self.call(aten.permute.default, x, list(order))

    def transpose(self, x: fx.Node, first: int, second: int) -> fx.Node:
        """x with two dimensions (not negative) swapped; undoes a permutation that x is."""
        order = list(range(len(shape_of(x))))
        order[first], order[second] = order[second], order[first]
        if x.target is aten.transpose.int and _permutation(x) == order:
            return x.args[0]  # pyright: ignore
        if x.target is aten.permute.default:
            return self.permute(x.args[0], [_permutation(x)[dim] for dim in order])  # pyright: ignore
        return self.call(aten.transpose.int, x, first, second)

    def reshape(self, x: fx.Node, shape: Sequence[Any]) -> fx.Node:
        """x with the shape given by expressions; the source of x when that has it."""
        wanted = tuple(shape)
        if shape_of(x) == wanted:
            return x
        if x.target is aten.reshape.default and shape_of(x.args[0]) == wanted:  # pyright: ignore
            return x.args[0]  # pyright: ignore
        dynamic = [i for i, extent in enumerate(wanted) if not isinstance(extent, int)]
        inferred = dynamic[:1] if 0 not in wanted else []
        sizes = [-1 if i in inferred else self.size(e, x) for i, e in enumerate(wanted)]
        value = x.meta["val"].new_empty([_extent(e, x.meta["val"]) for e in wanted])
        return self._insert(aten.reshape.default, (x, sizes), {}, value)

    def size(self, extent: Any, x: fx.Node) -> fx.Node | int:
        """A node for an extent: an integer, or read off x or another node before this place."""
        if isinstance(extent, int):
            return extent
        shape = shape_of(x)
        if extent in shape:
            return self.call(aten.sym_size.int, x, shape.index(extent))
        for node in self.program.graph.nodes:
            if node is self.before:
                break
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == extent:
                return node
        return self._product(extent, x)

    def _product(self, extent: Any, x: fx.Node) -> fx.Node:
        """A product of symbols, each of which is found on its own."""
        factors = list(extent.args) if extent.is_Mul else []
        if not factors:
            raise NoExtent(f"no node before {self.before.name} has the extent {extent}")
        sizes = [int(f) if f.is_Integer else self.size(f, x) for f in factors]
        total = sizes[0]
        for size in sizes[1:]:
            total = self.call(operator.mul, total, size)
        return total  # pyright: ignore

    def _fake_result(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, self._fake)
        kwargs = fx.map_arg(node.kwargs, self._fake)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # pyright: ignore

    def _fake(self, node: fx.Node) -> Any:
        if "val" not in node.meta and node.op == "get_attr":
            return self._fake_attribute(node)
        return node.meta["val"]

    def _fake_attribute(self, node: fx.Node) -> Any:
        mode = next(
            value.fake_mode  # pyright: ignore
            for other in self.program.graph.nodes
            if hasattr(value := other.meta.get("val"), "fake_mode")
        )
        node.meta["val"] = mode.from_tensor(attribute(self.program, node), static_shapes=True)
        return node.meta["val"]


def _extent(extent: Any, like: Tensor) -> int | torch.SymInt:
    """An extent as a fake tensor holds it; having it inferred from a -1 takes seconds."""
    if isinstance(extent, int):
        return extent
    own = (e for e in like.shape if isinstance(e, torch.SymInt))
    same = next((e for e in own if e.node.expr == extent), None)
    if same is not None:
        return same
    environment = like.fake_mode.shape_env  # pyright: ignore[reportAttributeAccessIssue]
    return environment.create_symintnode(extent, hint=None)


def _permutation(node: fx.Node) -> list[int]:
    """What a transpose or permute node does to the dimensions."""
    rank = len(shape_of(node))
    if node.target is aten.permute.default:
        return [dim % rank for dim in node.args[1]]  # pyright: ignore
    order = list(range(rank))
    first, second = (dim % rank for dim in node.args[1:] if isinstance(dim, int))
    order[first], order[second] = order[second], order[first]
    return order
