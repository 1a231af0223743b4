"""Raise rotary position embedding: what makes q and k of an attention depend on positions.

Walking back from q or k to the projection gives a region with operands that depend on positions
only: the tables. A node y of the region is rotary embedding of a node x when it equals
`rope(x, cos, sin)` on random values, with cos and sin views of the tables; the largest such part
is replaced. How the model spells the rotation does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx

from rewriter.dialect import rope
from rewriter.engine.miss import Miss
from rewriter.engine.site import bound_arguments
from rewriter.program import Program
from rewriter.raising.evaluate import needed
from rewriter.raising.linear import view_of
from rewriter.raising.position_tables import is_table
from rewriter.raising.region import region_key, replace_by, size_choices
from rewriter.raising.rotation import (
    END,
    LAYOUTS,
    UNREAD,
    Recipe,
    Region,
    Trial,
    extents,
    hypotheses,
    is_size,
    shapes_fit,
    wanted_shape,
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
"""Where the walk back from q or k ends: operators that mix features."""

_TOKEN_WISE = frozenset(
    {torch.ops.rewriter.rms_norm.default, torch.ops.rewriter.layer_norm.default}
)

LARGEST_REGION = 200
"""Nodes between a projection and an attention beyond which a region is not searched."""


def raise_rope(program: Program) -> list[Miss]:
    """Replace rotations of q and k by `rewriter::rope`, once attentions and norms are raised."""
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
            elif is_size(node):
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
        """The rotation that covers most: latest y, fewest changes of x, earliest x."""
        trials = [
            Trial(self.program, region, s, i) for i, s in enumerate(size_choices(region.nodes))
        ]
        for y in reversed(range(len(region.nodes))):
            for reshaped, transposed in LAYOUTS:
                for x in range(y):
                    base = Recipe(x, y, UNREAD, UNREAD, False, reshaped, transposed)
                    recipe = self.fit(region, trials, base)
                    if recipe is not None:
                        return recipe
        return None

    def fit(self, region: Region, trials: Sequence[Trial], base: Recipe) -> Recipe | None:
        """The hypothesis under which y is the rotation of x, if there is one."""
        source, output = region.nodes[base.x], region.nodes[base.y]
        if not shapes_fit(source, output, base):
            return None
        between = needed([output], dict.fromkeys((source, *region.tables, *region.constants)))
        if not _closed(between, region):
            return None
        used = {operand for node in between for operand in node.all_input_nodes}
        tables = [i for i, table in enumerate(region.tables) if table in used]
        if not tables:
            return None
        outputs = [trial.run(source, output) for trial in trials]
        for recipe in hypotheses(base, tables, region):
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
        x = _laid_out_before(self.program, x, y, recipe)
        if recipe.split_pairs:
            x = _split_pairs_before(self.program, x, y)
        new = replace_by(self.program, y, ROPE, (x, cos, sin), {"interleaved": recipe.interleaved})
        for cache, value in ((self.depends, self.depends.get(y)), (self.ranged, False)):
            if value is not None:
                cache[new] = value  # pyright: ignore[reportArgumentType]


def _closed(between: Sequence[fx.Node], region: Region) -> bool:
    """Whether running these nodes stays inside the region (sizes may be read anywhere)."""
    inside = set(region.nodes)
    return all(is_size(node) or (node in inside and not _ends(node)) for node in between)


def _ends(node: fx.Node) -> bool:
    if node.op == "placeholder" or node.target in MIXING:
        return True
    return getattr(node.target, "namespace", "") == "rewriter" and node.target not in _TOKEN_WISE


def _call_before(
    program: Program, y: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]
) -> fx.Node:
    with program.graph.inserting_before(y):
        new = program.graph.call_function(target, args)
    values = fx.map_arg(args, lambda node: node.meta["val"])
    new.meta = {**y.meta, "raised_from": y.name, "val": target(*values)}
    return new


def _laid_out_before(program: Program, x: fx.Node, y: fx.Node, recipe: Recipe) -> fx.Node:
    """x in the layout of y."""
    if recipe.reshaped:
        here = extents(x.meta["val"])
        sizes = [
            _call_before(program, y, aten.sym_size.int, (x, here.index(extent)))
            if isinstance(extent, str)
            else extent
            for extent in wanted_shape(y, recipe)
        ]
        x = _call_before(program, y, aten.reshape.default, (x, sizes))
    return _call_before(program, y, aten.transpose.int, (x, 1, 2)) if recipe.transposed else x


def _split_pairs_before(program: Program, x: fx.Node, y: fx.Node) -> fx.Node:
    """The even dimensions of x, then the odd ones."""
    parts = [
        _call_before(program, y, aten.slice.Tensor, (x, -1, start, END, 2)) for start in (0, 1)
    ]
    return _call_before(program, y, aten.cat.default, (parts, -1))
