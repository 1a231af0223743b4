"""What a rotation inside a region can look like, and whether it does on random values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.dialect import rope
from rewriter.program import Program
from rewriter.raising.evaluate import evaluate
from rewriter.raising.linear import view_of
from rewriter.raising.position_tables import random_positions
from rewriter.raising.region import EVALUATION_ERRORS, close, random_bindings

__all__ = [
    "END",
    "LAYOUTS",
    "UNREAD",
    "Recipe",
    "Region",
    "Trial",
    "View",
    "extents",
    "hypotheses",
    "is_size",
    "shapes_fit",
    "wanted_shape",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class View:
    """How cos or sin is read off a table: a part of the last dimension, perhaps transposed."""

    part: str  # "whole", "half", "even", "real" or "imag"
    transposed: bool = False

    def of(self, table: Tensor) -> Tensor:
        """The view of a tensor; raises RuntimeError when the part does not exist."""
        value = _PARTS[self.part](table)
        return value.transpose(1, 2) if self.transposed else value

    def insert(self, program: Program, table: fx.Node) -> fx.Node:
        """The view as nodes right after the table, reusing those that are there."""
        for target, *args in (*_PART_CALLS[self.part](table), *_TRANSPOSE[self.transposed]):
            table = view_of(program, table, target, *args)
        return table


_TRANSPOSE = {False: (), True: ((aten.transpose.int, 1, 2),)}
_PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda t: t,
    "half": lambda t: t[..., : t.shape[-1] // 2],
    "even": lambda t: t[..., 0::2],
    "real": torch.real,
    "imag": torch.imag,
}
END = 2**63 - 1
_PART_CALLS: dict[str, Callable[[fx.Node], tuple[tuple[Any, ...], ...]]] = {
    "whole": lambda t: (),
    "half": lambda t: ((aten.slice.Tensor, -1, 0, t.meta["val"].shape[-1] // 2),),
    "even": lambda t: ((aten.slice.Tensor, -1, 0, END, 2),),
    "real": lambda t: ((aten.view_as_real.default,), (aten.select.int, -1, 0)),
    "imag": lambda t: ((aten.view_as_real.default,), (aten.select.int, -1, 1)),
}


@dataclass(frozen=True)
class Recipe:
    """A rotation inside a region, by index: which nodes are x and y, and what cos and sin are."""

    x: int
    y: int
    cos: tuple[int, View]
    sin: tuple[int, View]
    interleaved: bool
    reshaped: bool = False  # x has the elements of y in another shape
    transposed: bool = False  # x is bshd and y is bhsd
    negated: bool = False  # the model rotates by the opposite angle
    split_pairs: bool = False  # x comes in pairs (2i, 2i+1), y in halves


UNREAD = (-1, View("whole"))
LAYOUTS = ((False, False), (False, True), (True, False), (True, True))
"""Whether x is reshaped, and whether transposed, to become like y: the fewest changes first."""


@dataclass
class Region:
    """What lies between an attention input and the projections it comes from.

    Attributes:
        nodes: boundary nodes first, then the region in graph order, the attention input last.
        tables: position-only operands; constants: nodes that depend on weights alone.
    """

    nodes: list[fx.Node]
    tables: list[fx.Node]
    constants: list[fx.Node] = field(default_factory=list)


class Trial:
    """Random values for one choice of sizes."""

    def __init__(self, program: Program, region: Region, sizes: dict[str, int], seed: int) -> None:
        self.program, self.region, self.sizes = program, region, sizes
        generator = torch.Generator().manual_seed(seed)
        positions = random_positions(program, sizes, generator)
        tables = evaluate(program, region.tables, positions, sizes=sizes)
        self.tables = dict(zip(region.tables, tables, strict=True))
        self.constants = random_bindings(region.constants, sizes, seed)

    def source(self, node: fx.Node) -> Tensor:
        """The random x."""
        return random_bindings([node], self.sizes, seed=7)[node]

    def run(self, x: fx.Node, y: fx.Node) -> Tensor | None:
        """What the region computes; None where it does not run."""
        bindings = {**self.tables, **self.constants, x: self.source(x)}
        try:
            return evaluate(self.program, [y], bindings, sizes=self.sizes)[0]
        except EVALUATION_ERRORS:
            return None

    def agrees(self, source: fx.Node, recipe: Recipe, expected: Tensor) -> bool:
        """Whether the hypothesis computes the same."""
        x = self.source(source)
        try:
            cos, sin = (
                v.of(self.tables[self.region.tables[i]]) for i, v in (recipe.cos, recipe.sin)
            )
            if recipe.reshaped:
                x = x.reshape(
                    expected.transpose(1, 2).shape if recipe.transposed else expected.shape
                )
            x = x.transpose(1, 2) if recipe.transposed else x
            x = torch.cat((x[..., 0::2], x[..., 1::2]), -1) if recipe.split_pairs else x
            sin = -sin if recipe.negated else sin
            return close(rope.reference(x, cos, sin, interleaved=recipe.interleaved), expected)
        except EVALUATION_ERRORS:
            return False


def shapes_fit(x: fx.Node, y: fx.Node, recipe: Recipe) -> bool:
    """Whether y has the dtype of x, and its shape after the changes of layout."""
    before, after = x.meta["val"], y.meta["val"]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if before.dtype != after.dtype or not before.is_floating_point() or before.dim() < 3:
        return False
    if recipe.transposed and after.dim() != 4:
        return False
    shape, wanted = extents(before), wanted_shape(y, recipe)
    return recipe.reshaped != (shape == wanted) and _dynamic(shape) == _dynamic(wanted)


def extents(value: Tensor) -> list[int | str]:
    """The shape, with the symbol or expression of every dynamic extent as text."""
    return [str(e) if isinstance(e, torch.SymInt) else int(e) for e in value.shape]


def wanted_shape(y: fx.Node, recipe: Recipe) -> list[int | str]:
    """The shape that x has before it is transposed to that of y."""
    wanted = extents(y.meta["val"])
    if recipe.transposed:
        wanted[1], wanted[2] = wanted[2], wanted[1]
    return wanted


def _dynamic(shape: Sequence[int | str]) -> tuple[list[str], int]:
    """The symbols of a shape and the product of its numbers: equal when a reshape is possible."""
    symbols = sorted(extent for extent in shape if isinstance(extent, str))
    return symbols, math.prod(extent for extent in shape if isinstance(extent, int))


def is_size(node: fx.Node) -> bool:
    """Whether the node is a number: an extent of something."""
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def hypotheses(base: Recipe, tables: Sequence[int], region: Region) -> Iterator[Recipe]:
    """Every reading of the tables: the usual ones first."""
    for cos, sin, parts in _readings(tables, region):
        views = [View(part, base.transposed) for part in parts]
        read = replace(base, cos=(cos, views[0]), sin=(sin, views[1]))
        for interleaved in (False, True):
            for negated in (False, True):
                yield replace(read, interleaved=interleaved, negated=negated)
        yield replace(read, split_pairs=True)


def _readings(tables: Sequence[int], region: Region) -> Iterator[tuple[int, int, tuple[str, str]]]:
    for cos in tables:
        if region.tables[cos].meta["val"].is_complex():
            yield cos, cos, ("real", "imag")
            continue
        for sin in tables:
            if sin != cos:
                yield from ((cos, sin, (part, part)) for part in ("half", "even", "whole"))
