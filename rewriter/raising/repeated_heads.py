"""Keys and values before they were repeated for the heads of a group, found by running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.dialect.attention import repeat_kv
from rewriter.program import Program
from rewriter.raising.evaluate import SIZE_QUERIES, UnboundInput, evaluate
from rewriter.raising.insertion import Inserter, shape_of
from rewriter.raising.position_tables import POSITIONS, random_positions
from rewriter.raising.region import EVALUATION_ERRORS, random_bindings, size_choices

__all__ = ["first_of_groups", "peel_repeat"]

aten = torch.ops.aten

_COPYING = frozenset(
    {
        aten.reshape.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.clone.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.transpose.int,
        aten.permute.default,
        aten.index_select.default,
        aten.slice.Tensor,
        aten.select.int,
    }
)
_LONGEST_CHAIN = 10
_MIXING = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.bmm.default,
        aten.matmul.default,
        aten.embedding.default,
    }
)
_LARGEST_REGION = 200


def peel_repeat(program: Program, insert: Inserter, x: fx.Node) -> fx.Node:
    """bhsd keys or values with as few heads as give x when repeated; x when it is no repeat.

    A chain of views and copies is followed back; a tensor in it counts when repeating its heads
    gives x on random values, so a repeat in another order of heads is left alone.
    """
    best: Reading | None = None
    for source in _chain(x):
        for reading in _readings(source, x):
            fewer = best is None or reading.shape[1] < best.shape[1]
            if fewer and _repeats(program, reading, x):
                best = reading
    return x if best is None else best.insert(insert)


@dataclass(frozen=True)
class Reading:
    """A tensor read as bhsd: extra ones dropped, heads and sequence perhaps swapped."""

    source: fx.Node
    shape: tuple[Any, ...]  # bhsd
    swapped: bool

    @property
    def own_shape(self) -> tuple[Any, ...]:
        """The shape before heads and sequence are swapped."""
        batch, heads, seq, width = self.shape
        return (batch, seq, heads, width) if self.swapped else self.shape

    def insert(self, insert: Inserter) -> fx.Node:
        """The reading as nodes."""
        node = insert.reshape(self.source, self.own_shape)
        return insert.transpose(node, 1, 2) if self.swapped else node


def _chain(x: fx.Node) -> Iterator[fx.Node]:
    """Ancestors of x through operators that only move or copy entries of their first operand."""
    for _ in range(_LONGEST_CHAIN):
        if x.target not in _COPYING:
            return
        x = x.args[0]  # pyright: ignore[reportAssignmentType]
        yield x


def _readings(source: fx.Node, x: fx.Node) -> Iterator[Reading]:
    """Ways to read a tensor as keys or values with fewer heads than x."""
    batch, heads, seq, width = shape_of(x)
    have = [extent for extent in shape_of(source) if extent != 1]
    for count in (c for c in range(1, heads) if heads % c == 0):
        for swapped in (False, True):
            reading = Reading(source, (batch, count, seq, width), swapped)
            if have == [extent for extent in reading.own_shape if extent != 1]:
                yield reading


def _repeats(program: Program, reading: Reading, x: fx.Node) -> bool:
    """Whether repeating the heads of a reading gives x, tried on random values."""
    for seed, sizes in enumerate(size_choices([reading.source, x])):
        bound = random_bindings([reading.source], sizes, seed)
        try:
            (actual,) = evaluate(program, [x], bound, sizes=sizes)
        except EVALUATION_ERRORS:
            return False
        batch, heads, seq, width = actual.shape
        own = [reading.shape[1], seq] if not reading.swapped else [seq, reading.shape[1]]
        peeled = bound[reading.source].reshape(batch, *own, width)
        peeled = peeled.transpose(1, 2) if reading.swapped else peeled
        if not torch.equal(repeat_kv(peeled, heads), actual):
            return False
    return True


def first_of_groups(program: Program, insert: Inserter, x: fx.Node, count: int) -> fx.Node | None:
    """The first head of each of `count` groups, when all heads of a group are always equal.

    This is how keys look that were repeated before they were rotated.
    """
    heads = shape_of(x)[1]
    region = _back_to_projections(x)
    if heads % count or region is None:
        return None
    for seed, sizes in enumerate(size_choices([*region, x])):
        values = random_bindings(region, sizes, seed)
        values |= random_positions(program, sizes, torch.Generator().manual_seed(seed))
        try:
            (value,) = evaluate(program, [x], values, sizes=sizes)
        except (*EVALUATION_ERRORS, UnboundInput):
            return None
        grouped = value.unflatten(1, (count, heads // count))
        if not torch.equal(grouped, grouped[:, :, :1].expand_as(grouped)):
            return None
    return insert.call(aten.slice.Tensor, x, 1, 0, 2**63 - 1, heads // count)


def _back_to_projections(x: fx.Node) -> list[fx.Node] | None:
    """Where a walk back from x meets operators that mix features; None when it does not end."""
    ends, seen, stack = [], {x}, [x]
    while stack:
        node = stack.pop()
        if node.target in _MIXING or (node.op == "placeholder" and node.name != POSITIONS):
            ends.append(node)
            continue
        operands = [] if node.target in SIZE_QUERIES else node.all_input_nodes
        fresh = [n for n in operands if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    tensors = [n for n in ends if isinstance(n.meta.get("val"), Tensor)]
    return sorted(tensors) if len(seen) <= _LARGEST_REGION else None
