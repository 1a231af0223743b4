"""Values of a large position-only tensor at chosen indices, without building the tensor.

A mask of length n has n² entries; whether a window of 32768 is one shows at a few hundred of them.
The demand for indices is passed down through pointwise operators and views to small tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.errors import RewriterError
from rewriter.program import Program
from rewriter.raising.evaluate import attribute, concrete_shape, evaluate

__all__ = ["SampledValues", "UnsupportedSample"]

aten = torch.ops.aten

Index = tuple[Tensor, ...]
"""For each dimension the indices wanted; the value is taken at their product."""

_SMALL = 1 << 16
_AFFORDABLE = 1 << 21
_FIRST = torch.zeros(1, dtype=torch.int64)

_POINTWISE = frozenset(
    {
        aten._to_copy.default,
        aten.to.dtype,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.where.Scalar,
        aten.__and__.Tensor,
        aten.__or__.Tensor,
        aten.__xor__.Tensor,
        aten.floor_divide.default,
        aten.isin.Tensor_Tensor,
    }
)
"""Pointwise operators that lack the tag."""
_FILLS: dict[Any, float | None] = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.full.default: None,
    aten.full_like.default: None,
    aten.new_full.default: None,
}
"""Constant tensors: the constant, or None for the second argument."""


class UnsupportedSample(RewriterError):
    """A large tensor is made by an operator that cannot be asked for single entries."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(f"cannot sample entries of {node.name!r} ({node.target})")
        self.node = node


class SampledValues:
    """Entries of nodes for one choice of sizes and position inputs."""

    def __init__(
        self, program: Program, bindings: Mapping[fx.Node, Tensor], sizes: Mapping[str, int]
    ) -> None:
        self.program, self.bindings, self.sizes = program, dict(bindings), dict(sizes)
        self.known: dict[fx.Node, Any] = {}
        self.parts: dict[Any, tuple[Index, Tensor]] = {}  # keeps the indices alive: ids are the key

    def at(self, node: fx.Node, index: Index) -> Tensor:
        """The node's value at the product of the indices. Raises UnsupportedSample."""
        key = (node, tuple(id(i) for i in index))
        if key not in self.parts:
            with torch.no_grad():
                self.parts[key] = (index, self._compute(node, index))
        return self.parts[key][1]

    def whole(self, node: fx.Node) -> Any:
        """The whole value of a small node."""
        if node not in self.known:
            self.known[node] = evaluate(self.program, [node], self.bindings, sizes=self.sizes)[0]
        return self.known[node]

    def _compute(self, node: fx.Node, index: Index) -> Tensor:
        if node.op == "get_attr":
            return _select(attribute(self.program, node), index)
        if torch.Size(concrete_shape(node, self.sizes)).numel() <= _SMALL:
            return _select(self.whole(node), index)
        if node.target in _FILLS:
            return self._fill(node, index)
        rule = _VIEW_RULES.get(node.target)
        if rule is not None:
            return self._viewed(node, index, rule)
        if node.target in _POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self._pointwise(node, index)
        if node.target in (aten.tril.default, aten.triu.default):
            return self._triangle(node, index)
        if node.target is aten.index.Tensor:
            return self._gather(node, index)
        if node.target is aten.embedding.default:
            rows = self.at(node.args[1], index[:-1])  # pyright: ignore[reportArgumentType]
            return self.whole(node.args[0])[rows].index_select(-1, index[-1])  # pyright: ignore
        return self._by_force(node, index)

    def _by_force(self, node: fx.Node, index: Index) -> Tensor:
        """An operator that is not understood: make the whole tensor if that is affordable."""
        if torch.Size(concrete_shape(node, self.sizes)).numel() > _AFFORDABLE:
            raise UnsupportedSample(node)
        return _select(self.whole(node), index)

    def _operand(self, value: Any, index: Index) -> Any:
        """An operand of a pointwise operator, its dimensions aligned with the result's."""
        if not isinstance(value, fx.Node):
            return value
        if not isinstance(value.meta.get("val", torch.empty(0)), Tensor):
            return self.whole(value)
        shape = self._shape(value)
        if not shape:
            return self.whole(value)
        return self.at(value, _aligned(shape, index))

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        if node.op == "get_attr":
            return tuple(attribute(self.program, node).shape)
        return concrete_shape(node, self.sizes)

    def _pointwise(self, node: fx.Node, index: Index) -> Tensor:
        args = [self._operand(a, index) for a in node.args]
        kwargs = {k: self._operand(v, index) for k, v in node.kwargs.items()}
        return node.target(*args, **kwargs)  # pyright: ignore

    def _fill(self, node: fx.Node, index: Index) -> Tensor:
        value = _FILLS[node.target]
        fill = self._scalar(node.args[1]) if value is None else value
        return torch.full([len(i) for i in index], fill, dtype=node.meta["val"].dtype)

    def _scalar(self, value: Any) -> Any:
        return self.whole(value) if isinstance(value, fx.Node) else value

    def _viewed(self, node: fx.Node, index: Index, rule: Callable[..., Index]) -> Tensor:
        source: fx.Node = node.args[0]  # pyright: ignore
        before, after = self._shape(source), concrete_shape(node, self.sizes)
        args = [self._scalar(a) if isinstance(a, fx.Node) else a for a in node.args[1:]]
        wanted = rule(index, before, after, *args)
        if wanted is None:
            return self._by_force(node, index)
        return _as_viewed(node, self.at(source, wanted), [len(i) for i in index])

    def _triangle(self, node: fx.Node, index: Index) -> Tensor:
        diagonal = self._scalar(node.args[1]) if len(node.args) > 1 else 0
        value = self.at(node.args[0], index)  # pyright: ignore
        distance = index[-1][None, :] - index[-2][:, None]
        lower = node.target is aten.tril.default
        keep = distance <= diagonal if lower else distance >= diagonal
        return torch.where(keep, value, torch.zeros_like(value))

    def _gather(self, node: fx.Node, index: Index) -> Tensor:
        source, places = node.args[0], node.args[1]
        if any(p is None for p in places) or len(places) != len(self._shape(source)):  # pyright: ignore
            return self._by_force(node, index)
        return self.whole(source)[tuple(self._operand(p, index) for p in places)]  # pyright: ignore


def _select(value: Tensor, index: Index) -> Tensor:
    for dim, wanted in enumerate(index):
        value = value.index_select(dim, wanted.to(value.device))
    return value


def _aligned(shape: Sequence[int], index: Index) -> Index:
    """The part of the indices that a broadcast operand of this shape is asked for."""
    last = index[len(index) - len(shape) :]
    return tuple(_FIRST if extent == 1 else i for extent, i in zip(shape, last, strict=True))


def _as_viewed(node: fx.Node, value: Tensor, shape: list[int]) -> Tensor:
    """The entries of a view's source, laid out as the view."""
    if node.target in (aten.transpose.int, aten.permute.default):
        return node.target(value, *node.args[1:])  # pyright: ignore
    if node.target in (aten.expand.default, aten.repeat.default):
        return value.expand(shape)
    return value.reshape(shape)


def _expand(index: Index, before: Sequence[int], after: Sequence[int], *_: Any) -> Index:
    return _aligned(before, index)


def _slice(
    index: Index,
    before: Sequence[int],
    after: Sequence[int],
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Index:
    first = start or 0
    first = max(first + before[dim], 0) if first < 0 else first
    return tuple(first + i * step if d == dim % len(before) else i for d, i in enumerate(index))


def _permuted(index: Index, order: Sequence[int]) -> Index:
    wanted = list(index)
    for position, dim in enumerate(order):
        wanted[dim] = index[position]
    return tuple(wanted)


def _transpose(
    index: Index, before: Sequence[int], after: Sequence[int], first: int, second: int
) -> Index:
    order = list(range(len(before)))
    order[first], order[second] = order[second], order[first]
    return _permuted(index, order)


def _permute(index: Index, before: Sequence[int], after: Sequence[int], order: list[int]) -> Index:
    return _permuted(index, [dim % len(before) for dim in order])


def _select_one(
    index: Index, before: Sequence[int], after: Sequence[int], dim: int, at: int
) -> Index:
    place, at = dim % len(before), at % before[dim]
    return (*index[:place], torch.tensor([at]), *index[place:])


def _repeat(index: Index, before: Sequence[int], after: Sequence[int], *_: Any) -> Index:
    last = index[len(index) - len(before) :]
    return tuple(i % extent for i, extent in zip(last, before, strict=True))


def _reshape(index: Index, before: Sequence[int], after: Sequence[int], *_: Any) -> Index | None:
    """Only dimensions of size 1 come or go; anything else cannot be followed."""
    if [e for e in before if e != 1] != [e for e in after if e != 1]:
        return None
    kept = iter(i for i, extent in zip(index, after, strict=True) if extent != 1)
    return tuple(_FIRST if extent == 1 else next(kept) for extent in before)


_VIEW_RULES: dict[Any, Callable[..., Any]] = {
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.select.int: _select_one,
    aten.repeat.default: _repeat,
    aten.reshape.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dims: _reshape,
}
