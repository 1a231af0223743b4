"""Raise rotary position embedding: what makes q and k of an attention depend on positions.

Walking back from q or k to the projection gives a region with operands that depend on positions only:
the tables. A node y of the region is rotary embedding of a node x when it equals `rope(x, cos, sin)`
on random values, with cos and sin views of the tables; the largest such part is replaced. How the
model spells the rotation does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.dialect import rope
from rewriter.engine.miss import Miss
from rewriter.engine.site import bound_arguments
from rewriter.program import Program
from rewriter.raising.evaluate import concrete_shape, evaluate, needed
from rewriter.raising.linear import view_of
from rewriter.raising.position_tables import is_table, random_positions
from rewriter.raising.region import (
    EVALUATION_ERRORS,
    close,
    random_bindings,
    region_key,
    replace_by,
    size_choices,
)

__all__ = ["raise_rope", "rope_tables"]

aten = torch.ops.aten
ROPE = rope.overload

MIXING = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.bmm.default,
        aten.matmul.default,
        aten.embedding.default,
        aten.convolution.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.scaled_dot_product_attention.default,
    }
)
"""Where the walk back from q or k ends: operators that mix features, and dialect operators that do."""

_TOKEN_WISE = frozenset(
    {torch.ops.rewriter.rms_norm.default, torch.ops.rewriter.layer_norm.default}
)

LARGEST_REGION = 200
"""Nodes between a projection and an attention beyond which a region is not searched."""


@dataclass(frozen=True)
class View:
    """How cos or sin is read off a table: a part of the last dimension, then perhaps a transpose."""

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
_END = 2**63 - 1
_PART_CALLS: dict[str, Callable[[fx.Node], tuple[tuple[Any, ...], ...]]] = {
    "whole": lambda t: (),
    "half": lambda t: ((aten.slice.Tensor, -1, 0, t.meta["val"].shape[-1] // 2),),
    "even": lambda t: ((aten.slice.Tensor, -1, 0, _END, 2),),
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
    transposed: bool = False  # x is bshd and y is bhsd
    negated: bool = False  # the model rotates by the opposite angle
    split_pairs: bool = False  # x comes in pairs (2i, 2i+1), y in halves


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


def raise_rope(program: Program) -> list[Miss]:
    """Replace rotations of q and k by `rewriter::rope`; run it after attentions and norms are raised."""
    search = _Search(program)
    misses: list[Miss] = []
    done: set[fx.Node] = set()
    for node in program.calls(torch.ops.rewriter.attention.default):
        arguments = bound_arguments(node)
        for name in ("q", "k"):
            if arguments[name] in done:
                continue
            done.add(arguments[name])
            misses.extend(search.raise_input(arguments[name], name))
    program.finish()
    return misses


def rope_tables(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The nodes that compute cos and sin of a `rewriter::rope` call."""
    arguments = bound_arguments(node)
    return arguments["cos"], arguments["sin"]


class _Search:
    """One walk over a program; caches what does not change while it runs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.depends: dict[fx.Node, frozenset[str]] = {}
        self.ranged: dict[fx.Node, bool] = {}
        self.recipes: dict[Hashable, Recipe | None] = {}

    def raise_input(self, node: fx.Node, name: str) -> list[Miss]:
        """Raise the rotation of one attention input; a miss if positions enter some other way."""
        region = self.region(node)
        if not region.tables:
            return []
        key = (region_key(region.nodes, region.tables), len(region.tables))
        if key not in self.recipes:
            self.recipes[key] = self.find(region)
        recipe = self.recipes[key]
        if recipe is None:
            first = next(n for n in region.nodes if set(n.all_input_nodes) & set(region.tables))
            reason = f"{name} depends on positions through something that is not a rotation"
            return [Miss.at(first, "raise-rope", reason)]
        self.apply(region, recipe)
        return []

    def region(self, output: fx.Node) -> Region:
        """Walk back from an attention input to projections, tables and weights."""
        inside: list[fx.Node] = []
        region = Region([], [])
        seen, stack = {output}, [output]
        while stack:
            node = stack.pop()
            if is_table(node, self.depends, self.ranged):
                region.tables.append(node)
            elif _is_size(node):
                continue
            elif not self.depends[node]:
                region.constants.append(node)
            else:
                inside.append(node)
                fresh = [] if _ends(node) else [n for n in node.all_input_nodes if n not in seen]
                seen.update(fresh)
                stack.extend(fresh)
        if len(inside) > LARGEST_REGION:
            return Region([], [])
        region.nodes = sorted(inside)
        region.tables.sort()
        return region

    def find(self, region: Region) -> Recipe | None:
        """The rotation that covers most: latest y, then one without a transpose, then earliest x."""
        trials = [
            _Trial(self.program, region, s, i) for i, s in enumerate(size_choices(region.nodes))
        ]
        for y in reversed(range(len(region.nodes))):
            for transposed in (False, True):
                for x in range(y):
                    recipe = self.fit(region, trials, x, y, transposed)
                    if recipe is not None:
                        return recipe
        return None

    def fit(
        self, region: Region, trials: Sequence[_Trial], x: int, y: int, transposed: bool
    ) -> Recipe | None:
        """The hypothesis under which y is the rotation of x, if there is one."""
        source, output = region.nodes[x], region.nodes[y]
        if not _shapes_fit(source, output, trials[0].sizes, transposed):
            return None
        between = needed([output], {n: None for n in (source, *region.tables, *region.constants)})
        if not _closed(between, region):
            return None
        used = {operand for node in between for operand in node.all_input_nodes}
        tables = [i for i, table in enumerate(region.tables) if table in used]
        if not tables:
            return None
        outputs = [trial.run(source, output) for trial in trials]
        for recipe in _hypotheses(x, y, tables, region, transposed):
            if all(
                out is not None and trial.agrees(source, recipe, out)
                for trial, out in zip(trials, outputs, strict=True)
            ):
                return recipe
        return None

    def apply(self, region: Region, recipe: Recipe) -> None:
        """Put `rope` in the place of y."""
        x, y = region.nodes[recipe.x], region.nodes[recipe.y]
        cos, sin = (
            view.insert(self.program, region.tables[i]) for i, view in (recipe.cos, recipe.sin)
        )
        if recipe.negated:
            sin = view_of(self.program, sin, aten.neg.default)
        if recipe.transposed:
            x = _call_before(self.program, y, aten.transpose.int, (x, 1, 2))
        if recipe.split_pairs:
            x = _split_pairs_before(self.program, x, y)
        new = replace_by(self.program, y, ROPE, (x, cos, sin), {"interleaved": recipe.interleaved})
        for cache, value in ((self.depends, self.depends.get(y)), (self.ranged, False)):
            if value is not None:
                cache[new] = value  # pyright: ignore[reportArgumentType]


class _Trial:
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
            x = x.transpose(1, 2) if recipe.transposed else x
            x = torch.cat((x[..., 0::2], x[..., 1::2]), -1) if recipe.split_pairs else x
            sin = -sin if recipe.negated else sin
            return close(rope.reference(x, cos, sin, interleaved=recipe.interleaved), expected)
        except EVALUATION_ERRORS:
            return False


def _ends(node: fx.Node) -> bool:
    if node.op == "placeholder" or node.target in MIXING:
        return True
    return getattr(node.target, "namespace", "") == "rewriter" and node.target not in _TOKEN_WISE


def _shapes_fit(x: fx.Node, y: fx.Node, sizes: Mapping[str, int], transposed: bool) -> bool:
    """Whether y has the dtype and shape of x, or of its transpose."""
    before, after = x.meta["val"], y.meta["val"]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if before.dtype != after.dtype or not before.is_floating_point() or before.dim() < 3:
        return False
    shape = list(concrete_shape(x, sizes))
    if transposed:
        if len(shape) != 4:
            return False
        shape[1], shape[2] = shape[2], shape[1]
    return tuple(shape) == concrete_shape(y, sizes)


def _closed(between: Sequence[fx.Node], region: Region) -> bool:
    """Whether running these nodes stays inside the region (sizes may be read anywhere)."""
    inside = set(region.nodes)
    return all(_is_size(node) or (node in inside and not _ends(node)) for node in between)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _hypotheses(
    x: int, y: int, tables: Sequence[int], region: Region, transposed: bool
) -> Iterator[Recipe]:
    """Every reading of the tables: the usual ones first."""
    for cos, sin, parts in _readings(tables, region):
        views = [View(part, transposed) for part in parts]
        base = Recipe(x, y, (cos, views[0]), (sin, views[1]), False, transposed)
        for interleaved in (False, True):
            for negated in (False, True):
                yield replace(base, interleaved=interleaved, negated=negated)
        yield replace(base, split_pairs=True)


def _readings(tables: Sequence[int], region: Region) -> Iterator[tuple[int, int, tuple[str, str]]]:
    for cos in tables:
        if region.tables[cos].meta["val"].is_complex():
            yield cos, cos, ("real", "imag")
            continue
        for sin in tables:
            if sin != cos:
                yield from ((cos, sin, (part, part)) for part in ("half", "even", "whole"))


def _call_before(
    program: Program, y: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]
) -> fx.Node:
    with program.graph.inserting_before(y):
        new = program.graph.call_function(target, args)
    values = fx.map_arg(args, lambda node: node.meta["val"])
    new.meta = {**y.meta, "raised_from": y.name, "val": target(*values)}
    return new


def _split_pairs_before(program: Program, x: fx.Node, y: fx.Node) -> fx.Node:
    """The even dimensions of x, then the odd ones."""
    parts = [
        _call_before(program, y, aten.slice.Tensor, (x, -1, start, _END, 2)) for start in (0, 1)
    ]
    return _call_before(program, y, aten.cat.default, (parts, -1))
