"""Bring the operands of an attention to bhsd, and take constants and casts off them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewriter.raising.insertion import Inserter, shape_of

__all__ = [
    "Heads",
    "Unsupported",
    "heads_of",
    "peel_casts",
    "peel_scale",
    "term_to_bhsd",
    "to_bhsd",
]

aten = torch.ops.aten

Scalar = Callable[[Any], float | None]

_SCALING = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
_LAYOUT = frozenset({aten.transpose.int, aten.permute.default, aten.reshape.default})


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


def peel_scale(insert: Inserter, x: fx.Node, scalar: Scalar) -> tuple[fx.Node, float]:
    """The tensor before multiplications by constants, under views, and the factor they make.

    Args:
        scalar: the value of a constant operand; None when it is not constant.
    """
    source = x.args[0] if x.args else None
    if not isinstance(source, fx.Node):
        return x, 1.0
    if x.target in _LAYOUT:
        inner, factor = peel_scale(insert, source, scalar)
        if factor == 1.0:
            return x, 1.0
        return insert.call(x.target, inner, *x.args[1:], **x.kwargs), factor
    number = scalar(x.args[1]) if x.target in _SCALING and len(x.args) == 2 else None
    if not number or x.kwargs or shape_of(source) != shape_of(x):
        return x, 1.0
    if source.meta["val"].dtype != x.meta["val"].dtype:
        return x, 1.0
    inner, factor = peel_scale(insert, source, scalar)
    divided = x.target in (aten.div.Tensor, aten.div.Scalar)
    return inner, factor / number if divided else factor * number


def peel_casts(x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The tensor of this dtype that a cast to a wider one reads; x itself when there is none."""
    while x.meta["val"].dtype != dtype and x.target in (aten._to_copy.default, aten.to.dtype):
        x = x.args[0]  # pyright: ignore[reportAssignmentType]
    return x
