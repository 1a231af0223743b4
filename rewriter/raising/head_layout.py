"""Bring the operands of an attention to bhsd, and find keys and values before they were repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewriter.dialect.attention import repeat_kv
from rewriter.program import Program
from rewriter.raising.evaluate import evaluate
from rewriter.raising.insertion import Inserter, shape_of
from rewriter.raising.region import EVALUATION_ERRORS, random_bindings, size_choices

__all__ = ["Heads", "Unsupported", "heads_of", "peel_casts", "peel_repeat", "peel_scale", "term_to_bhsd", "to_bhsd"]

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


class Unsupported(Exception):
    """The operands have a layout that has no bhsd form; the message says which."""


@dataclass(frozen=True)
class Heads:
    """How the leading extents of the scores are batch and heads.

    Attributes:
        batch: extent of the batch in bhsd; count: number of query heads.
        merged: the leading extents are one, batch · heads.
    """

    batch: Any
    count: int
    lead: tuple[Any, ...]


def heads_of(lead: Sequence[Any], neighbours: Sequence[fx.Node]) -> Heads:
    """Read batch and heads off the leading extents.

    Args:
        lead: of the scores: [], [batch · heads], [batch, heads] or [batch, heads, group].
        neighbours: nodes next to the products, whose shapes tell merged heads apart.

    Raises:
        Unsupported: more leading dimensions, or a dynamic number of heads.
    """
    lead = tuple(lead)
    if len(lead) == 0:
        return Heads(1, 1, lead)
    if len(lead) == 1:
        return _split_heads(lead[0], neighbours)
    if not all(isinstance(extent, int) for extent in lead[1:]):
        raise Unsupported(f"the number of heads is not fixed in leading extents {lead}")
    if len(lead) > 3:
        raise Unsupported(f"scores with {len(lead) + 2} dimensions")
    count = 1
    for extent in lead[1:]:
        count *= extent
    return Heads(lead[0], count, lead)


def _split_heads(merged: Any, neighbours: Sequence[fx.Node]) -> Heads:
    """Batch and heads that a reshape nearby merges or splits; one head when there is none."""
    for node in neighbours:
        for other in (node, *node.all_input_nodes, *node.users):
            shape = shape_of(other)
            if len(shape) == 4 and isinstance(shape[1], int) and shape[0] * shape[1] == merged:
                return Heads(shape[0], shape[1], (merged,))
    return Heads(merged, 1, (merged,))


def to_bhsd(insert: Inserter, x: fx.Node, heads: Heads) -> fx.Node:
    """An operand [*lead, rows, columns] as [batch_size, its heads, rows, columns].

    Leading extents of 1 broadcast: one head stays one head, a group of 1 is dropped.
    """
    x = _with_four_dims(insert, x, heads)
    if shape_of(x)[0] == heads.batch:
        return x
    return insert.call(aten.expand.default, x, [insert.size(heads.batch, x), -1, -1, -1])


def term_to_bhsd(insert: Inserter, x: fx.Node, shape: Sequence[Any], heads: Heads) -> fx.Node:
    """What broadcasts to scores of a shape, as something that broadcasts to the scores in bhsd."""
    lead = tuple(shape[:-2])
    if len(shape_of(x)) <= 2 or lead == (heads.batch, heads.count):
        return x
    if lead == heads.lead:
        return _with_four_dims(insert, x, heads)
    x = insert.call(aten.expand.default, x, [insert.size(extent, x) for extent in shape])
    return insert.reshape(x, (heads.batch, heads.count, *shape[-2:]))


def _with_four_dims(insert: Inserter, x: fx.Node, heads: Heads) -> fx.Node:
    lead, last = shape_of(x)[:-2], shape_of(x)[-2:]
    if len(last) < 2:
        raise Unsupported(f"an operand of the scores has shape {shape_of(x)}")
    lead = (*[1] * (len(heads.lead) - len(lead)), *lead)
    return insert.reshape(x, (*_batch_and_heads(lead, heads), *last))


def _batch_and_heads(lead: Sequence[Any], heads: Heads) -> tuple[Any, Any]:
    if len(lead) == 0:
        return (1, 1)
    if len(lead) == 1:
        return (heads.batch, heads.count) if lead[0] == heads.lead[0] else (1, 1)
    if len(lead) == 3 and lead[1] == 1 and lead[2] != 1:
        raise Unsupported("an operand is shared by the heads of different groups")
    return (lead[0], lead[1] if len(lead) == 2 else lead[1] * lead[2])


def peel_scale(x: fx.Node, scalar: Any) -> tuple[fx.Node, float]:
    """The tensor before multiplications by constants just in front of a product, and the factor."""
    factor = 1.0
    while x.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        number = scalar(x.args[1]) if len(x.args) == 2 else None
        source = x.args[0]
        if not number or x.kwargs or not isinstance(source, fx.Node):
            break
        if shape_of(source) != shape_of(x) or source.meta["val"].dtype != x.meta["val"].dtype:
            break
        divided = x.target in (aten.div.Tensor, aten.div.Scalar)
        x, factor = source, factor / number if divided else factor * number
    return x, factor


def peel_casts(x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The tensor of this dtype that a cast to a wider one reads; x itself when there is none."""
    while x.meta["val"].dtype != dtype and x.target in (aten._to_copy.default, aten.to.dtype):
        x = x.args[0]  # pyright: ignore[reportAssignmentType]
    return x


def peel_repeat(program: Program, insert: Inserter, x: fx.Node) -> fx.Node:
    """bhsd keys or values with as few heads as give x when each is repeated; x when it is no repeat.

    A chain of views and copies is followed back; a tensor in it counts when repeating its heads gives
    x on random values, so a repeat in another order of heads is left alone.
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
    """A tensor read as bhsd: its shape with extra ones dropped, heads and sequence perhaps swapped."""

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
