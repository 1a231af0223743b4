"""Raise RMS and layer normalisation, however they are spelled.

The anchor is a reciprocal square root. Walking back from it over pointwise operators and means
gives candidates for the input x, walking forward over what x, the root and weights determine gives
candidates for the output y. A pair is a norm when y equals the dialect operator on random x and
random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.dialect import layer_norm, rms_norm
from rewriter.dialect.registry import DialectOp
from rewriter.engine.miss import Miss
from rewriter.engine.site import bound_arguments
from rewriter.program import Program
from rewriter.raising.evaluate import depends_on, needed
from rewriter.raising.region import agrees, region_key, replace_by, size_choices, strictness

__all__ = ["raise_norm"]

aten = torch.ops.aten

_POINTWISE = frozenset(
    {
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.pow.Tensor_Scalar,
        aten.square.default,
        aten.sqrt.default,
        aten.rsqrt.default,
        aten.reciprocal.default,
        aten.neg.default,
        aten._to_copy.default,
        aten.clone.default,
    }
)
_REDUCTIONS = frozenset({aten.mean.dim, aten.var.dim, aten.var.correction, aten.sum.dim_IntList})
_FARTHEST_BACK, _FARTHEST_ON = 9, 24
"""Nodes from the root back to x, and on to every y: casts, offsets, weights and biases."""


@dataclass(frozen=True)
class Recipe:
    """Which nodes of a region are x and y, and with what arguments the dialect operator fits."""

    op: DialectOp
    x: int
    y: int
    tensors: tuple[int, ...]  # weight, bias
    literals: tuple[tuple[str, Any], ...]


@dataclass
class Region:
    """Nodes around one root: what can be x first, then what can be y; and the weights they use.

    Attributes:
        roots: nodes[:roots] are the root and its ancestors.
        weights: what is passed to the dialect operator; derived: nodes computed from weights alone.
    """

    nodes: list[fx.Node]
    roots: int
    weights: list[fx.Node]
    derived: list[fx.Node] = field(default_factory=list)

    @property
    def key(self) -> Hashable:
        """Equal for regions that the same recipe fits."""
        return region_key([*self.weights, *self.derived, *self.nodes]), self.roots


def raise_norm(program: Program) -> list[Miss]:
    """Replace normalisations over the last dimension by `rewriter::rms_norm` and `layer_norm`."""
    _raise_calls(program)
    search = _Search(program)
    misses: list[Miss] = []
    for root in [node for node in program.graph.nodes if _is_root(node)]:
        if not search.raise_root(root) and search.has_mean(root):
            misses.append(_miss(root))
    program.finish()
    return misses


class _Search:
    """One walk over a program; caches what does not change while it runs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.depends: dict[fx.Node, frozenset[str]] = {}
        self.recipes: dict[Hashable, Recipe | None] = {}

    def raise_root(self, root: fx.Node) -> int:
        """Raise every norm that uses the root (norms of one x share it); how many there were."""
        count = 0
        while root.users:
            computed = _region(root, self.depends)
            found = (r for r in (_with_parameters(computed), computed) if self.recipe(r))
            region = next(found, None)
            if region is None:
                break
            _apply(self.program, region, self.recipe(region))
            count += 1
        return count

    def recipe(self, region: Region) -> Recipe | None:
        """What fits the region; searched once for all regions of its structure."""
        key = region.key
        if key not in self.recipes:
            self.recipes[key] = _find(self.program, region)
        return self.recipes[key]

    def has_mean(self, root: fx.Node) -> bool:
        """Whether the root is of a mean, as in a norm."""
        return any(node.target is aten.mean.dim for node in _back(root, self.depends))


def _miss(node: fx.Node) -> Miss:
    return Miss.at(node, "raise-norm", "a mean under a root, but no RMS or layer norm fits its use")


def _raise_calls(program: Program) -> None:
    """The library's own calls, over the last dimension."""
    for node in program.calls(aten.layer_norm.default):
        values = bound_arguments(node)
        if len(values["normalized_shape"]) == 1:
            tensors = (values["input"], values["weight"], values["bias"])
            replace_by(program, node, layer_norm.overload, tensors, {"eps": values["eps"]})
    for node in program.calls(aten.rms_norm.default):
        values = bound_arguments(node)
        if len(values["normalized_shape"]) == 1:
            dtype = values["input"].meta["val"].dtype
            eps = values["eps"] if values["eps"] is not None else torch.finfo(dtype).eps
            kwargs = {"eps": eps, "wide_weight": True}
            tensors = (values["input"], values["weight"])
            replace_by(program, node, rms_norm.overload, tensors, kwargs)


def _is_root(node: fx.Node) -> bool:
    """Whether the node is 1/sqrt of something: rsqrt, sqrt to divide by, or a power of -1/2."""
    if node.target in (aten.rsqrt.default, aten.sqrt.default):
        return True
    return node.target is aten.pow.Tensor_Scalar and node.args[1] in (-0.5, 0.5)


def _region(root: fx.Node, depends: dict[fx.Node, frozenset[str]]) -> Region:
    back = _back(root, depends)
    forward, inside = [], set(back)
    frontier = [user for node in back for user in node.users]
    weights: dict[fx.Node, None] = {}
    while frontier and len(forward) < _FARTHEST_ON:
        node = min(frontier)
        frontier.remove(node)
        if node in inside or node.target not in _POINTWISE:
            continue
        outside = [n for n in node.all_input_nodes if n not in inside]
        if any(depends_on(n, depends) for n in outside):
            continue
        weights.update(dict.fromkeys(outside))
        inside.add(node)
        forward.append(node)
        frontier.extend(node.users)
    return Region([*back, *forward], len(back), list(weights))


def _with_parameters(region: Region) -> Region:
    """The region in terms of parameters themselves, where it uses values computed from them."""
    below = needed(region.weights, {})
    parameters = [node for node in below if node.op == "get_attr"]
    derived = [node for node in below if node.op != "get_attr"]
    return Region(region.nodes, region.roots, parameters, derived)


def _back(root: fx.Node, depends: dict[fx.Node, frozenset[str]]) -> list[fx.Node]:
    """The root's ancestors over pointwise operators and reductions, in graph order."""
    seen, frontier = {root}, [root]
    while frontier and len(seen) <= _FARTHEST_BACK:
        node = max(frontier)
        frontier.remove(node)
        if node.target not in _POINTWISE and node.target not in _REDUCTIONS:
            continue
        operands = [n for n in node.all_input_nodes if n not in seen and depends_on(n, depends)]
        seen.update(operands)
        frontier.extend(operands)
    return sorted(seen)


def _find(program: Program, region: Region) -> Recipe | None:
    """The pair that covers most: the latest y, then the earliest x."""
    for y in reversed(range(region.roots, len(region.nodes))):
        for x in range(region.roots):
            source, output = region.nodes[x], region.nodes[y]
            if _type(source) == _type(output) and _closed(source, output, region):
                recipe = _fit(program, region, x, y)
                if recipe is not None:
                    return recipe
    return None


def _fit(program: Program, region: Region, x: int, y: int) -> Recipe | None:
    """The arguments with which y is a norm of x, equal to the bit if there are such."""
    inputs, output = [region.nodes[x], *region.weights], region.nodes[y]
    sizes = size_choices(region.nodes)
    for exact in strictness(inputs):
        for recipe in _hypotheses(region, x, y):
            reference = _reference(region, recipe)
            if agrees(program, output, inputs, reference, sizes=sizes, exact=exact):
                return recipe
    return None


def _type(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return (value.dtype, *(str(extent) for extent in value.shape))


def _closed(source: fx.Node, output: fx.Node, region: Region) -> bool:
    inside = {*region.nodes, *region.derived}
    between = needed([output], dict.fromkeys((source, *region.weights)))
    known = _POINTWISE | _REDUCTIONS
    return all(node in inside and node.target in known for node in between)


def _reference(region: Region, recipe: Recipe) -> Callable[[Mapping[fx.Node, Tensor]], Tensor]:
    def reference(values: Mapping[fx.Node, Tensor]) -> Tensor:
        tensors = [values[region.weights[i]] for i in recipe.tensors]
        return recipe.op.reference(
            values[region.nodes[recipe.x]], *tensors, **dict(recipe.literals)
        )

    return reference


def _hypotheses(region: Region, x: int, y: int) -> Iterator[Recipe]:
    """Every way to use the literals and weights of the region."""
    width = region.nodes[x].meta["val"].shape[-1]
    used = set(needed([region.nodes[y]], {region.nodes[x]: None}))
    vectors = [
        i
        for i, weight in enumerate(region.weights)
        if weight in used and tuple(weight.meta["val"].shape) == (width,)
    ]
    for eps in _literals(region):
        yield Recipe(rms_norm, x, y, (), (("eps", eps),))
        for weight in vectors:
            for options in ({}, {"weight_offset": 1.0}, {"wide_weight": True}):
                literals = (("eps", eps), *options.items())
                yield Recipe(rms_norm, x, y, (weight,), literals)
        yield Recipe(layer_norm, x, y, (), (("eps", eps),))
        for weight in vectors:
            yield Recipe(layer_norm, x, y, (weight,), (("eps", eps),))
            for bias in vectors:
                if bias != weight:
                    yield Recipe(layer_norm, x, y, (weight, bias), (("eps", eps),))


def _literals(region: Region) -> list[float]:
    """Small numbers that the region adds: candidates for eps."""
    adds = (n for n in region.nodes if n.target in (aten.add.Tensor, aten.add.Scalar))
    found = [a for n in adds for a in n.args if isinstance(a, float | int) and 0 <= a < 0.1]
    return [*dict.fromkeys(float(value) for value in found)] or [0.0]


def _apply(program: Program, region: Region, recipe: Recipe | None) -> None:
    """Put the dialect operator in the place of y, and drop what only y used."""
    if recipe is None:
        return
    tensors = tuple(region.weights[i] for i in recipe.tensors)
    args = (region.nodes[recipe.x], *tensors)
    replace_by(program, region.nodes[recipe.y], recipe.op.overload, args, dict(recipe.literals))
    for node in reversed(region.nodes):
        if not node.users and node is not region.nodes[region.roots - 1]:
            program.graph.erase_node(node)
