"""Raise mixtures of experts: from routed tokens to the weighted sum of their experts' outputs.

The anchor is a sum over the experts of a token. Walking back ends at matrices with a row per token:
the tokens x, the experts chosen (integers) and their weights; in between are gathers, sorts and
products with stacked weights, spelled in several ways. The region is a mixture when it equals the
dialect operator on random tokens, random choices and random weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.dialect import moe
from rewriter.dialect.mlp import ACTIVATIONS
from rewriter.dialect.moe import GATINGS
from rewriter.engine.miss import Miss
from rewriter.program import Program
from rewriter.raising.evaluate import attribute, depends_on, evaluate
from rewriter.raising.region import (
    EVALUATION_ERRORS,
    close,
    random_bindings,
    region_key,
    replace_by,
    size_choices,
)

__all__ = ["raise_moe"]

aten = torch.ops.aten

_LARGEST = 60
"""Nodes of the longest region that is searched."""

_MOST_RANDOM = 2**24
"""Elements of random weights made at most for one trial."""

_PRODUCTS = frozenset({"bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"})


@dataclass
class Region:
    """A candidate: `output` from tokens, choice, its weights and the experts' parameters."""

    output: fx.Node
    tokens: fx.Node
    index: fx.Node
    weight: fx.Node
    parameters: list[fx.Node]  # get_attr nodes, in the order in which they are used
    nodes: list[fx.Node]


@dataclass(frozen=True)
class Recipe:
    """Which parameters are what, and the literals of the dialect call."""

    parameters: tuple[int | None, ...]  # up, down, up_bias, down_bias
    literals: tuple[tuple[str, Any], ...]


def raise_moe(program: Program) -> list[Miss]:
    """Replace expert blocks by `rewriter::moe`; other products with stacked weights are misses."""
    depends: dict[fx.Node, frozenset[str]] = {}
    recipes: dict[Hashable, Recipe | None] = {}
    for node in program.calls(aten.sum.dim_IntList):
        region = _region(node, depends)
        if region is None:
            continue
        key = region_key([*region.parameters, *region.nodes])
        if key not in recipes:
            recipes[key] = _find(program, region)
        recipe = recipes[key]
        if recipe is not None:
            _apply(program, region, recipe)
    program.finish()
    return _misses(program)


def _misses(program: Program) -> list[Miss]:
    reason = "a product with stacked expert weights that is not a known mixture of experts"
    left: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if _is_product(node) and any(_is_stacked(n) for n in node.all_input_nodes):
            left.setdefault(str(node.meta.get("nn_module_stack", node.name)), node)
    return [Miss.at(node, "raise-moe", reason) for node in left.values()]


def _is_product(node: fx.Node) -> bool:
    return getattr(node.target, "_opname", "") in _PRODUCTS


def _is_stacked(node: fx.Node) -> bool:
    """Whether the node is a three-dimensional parameter, or a view or a gather of one."""
    while node.op == "call_function" and node.target in (
        aten.transpose.int,
        aten.index.Tensor,
        aten.reshape.default,
    ):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node.op == "get_attr" and node.meta["val"].dim() == 3


def _cast_user(node: fx.Node) -> fx.Node:
    """The cast of the sum back to the tokens' dtype, if that is its only use."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is aten._to_copy.default else node


def _region(total: fx.Node, depends: dict[fx.Node, frozenset[str]]) -> Region | None:
    output, shape = _cast_user(total), total.meta["val"].shape
    if len(shape) != 2:
        return None
    rows: list[fx.Node] = []
    parameters: list[fx.Node] = []
    nodes: list[fx.Node] = []
    seen, stack = {output}, [output]
    while stack:
        node = stack.pop()
        if (
            node not in (output, total)
            and _is_per_token(node, str(shape[0]))
            and depends_on(node, depends)
        ):
            rows.append(node)
            continue
        if node.op == "get_attr":
            parameters.append(node)
            continue
        if len(nodes) > _LARGEST or node.op == "placeholder":
            return None
        nodes.append(node)
        operands = [n for n in node.all_input_nodes if n not in seen and not _is_size(n)]
        seen.update(operands)
        stack.extend(operands)
    return _classified(output, rows, parameters, sorted(nodes))


def _is_per_token(node: fx.Node, tokens: str) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 2 and str(value.shape[0]) == tokens


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _classified(
    output: fx.Node, rows: Sequence[fx.Node], parameters: Sequence[fx.Node], nodes: list[fx.Node]
) -> Region | None:
    """The three inputs by dtype and width; None where they are others."""
    index = [n for n in rows if not n.meta["val"].is_floating_point()]
    if len(rows) != 3 or len(index) != 1 or not any(n.meta["val"].dim() == 3 for n in parameters):
        return None
    others = [n for n in rows if n is not index[0]]
    width = output.meta["val"].shape[1]
    others.sort(key=lambda n: n.meta["val"].shape[1] != width)
    tokens, weight = others
    chosen = index[0].meta["val"].shape[1]
    if tokens.meta["val"].shape[1] != width or weight.meta["val"].shape[1] != chosen:
        return None
    return Region(output, tokens, index[0], weight, sorted(parameters, key=_first_use), nodes)


def _first_use(parameter: fx.Node) -> fx.Node:
    return min(parameter.users)


def _find(program: Program, region: Region) -> Recipe | None:
    inputs = [region.tokens, region.weight]
    trials = []
    for seed, sizes in enumerate(size_choices([region.index, region.output, *inputs])):
        values = random_bindings(inputs, sizes, seed)
        values.update(_parameter_values(program, region, seed))
        values[region.index] = _random_choice(region, values, seed)
        try:
            (actual,) = evaluate(program, [region.output], values, sizes=sizes)
        except EVALUATION_ERRORS:
            return None
        trials.append((values, actual))
    for recipe in _hypotheses(region):
        if all(close(_reference(region, recipe, values), actual) for values, actual in trials):
            return recipe
    return None


def _parameter_values(program: Program, region: Region, seed: int) -> dict[fx.Node, Tensor]:
    """Random weights, which hide nothing; the model's own where those would take much memory."""
    if sum(p.meta["val"].numel() for p in region.parameters) <= _MOST_RANDOM:
        return random_bindings(region.parameters, {}, seed)
    return {parameter: attribute(program, parameter) for parameter in region.parameters}


def _random_choice(region: Region, values: Mapping[fx.Node, Tensor], seed: int) -> Tensor:
    """Distinct experts for every token."""
    experts = next(p for p in region.parameters if p.meta["val"].dim() == 3).meta["val"].shape[0]
    tokens, chosen = values[region.weight].shape
    scores = torch.rand((tokens, experts), generator=torch.Generator().manual_seed(seed))
    return scores.topk(chosen).indices.to(region.index.meta["val"].dtype)


def _hypotheses(region: Region) -> Iterator[Recipe]:
    """Every reading of the parameters that their shapes allow, with every activation."""
    stacked = [i for i, p in enumerate(region.parameters) if p.meta["val"].dim() == 3]
    flat: list[int | None] = [
        i for i, p in enumerate(region.parameters) if p.meta["val"].dim() == 2
    ]
    biases = [flat, flat[::-1]] if len(flat) == 2 else [[None, None]]
    limits = [{"activation": "identity", "limit": limit} for limit in _limits(region)]
    activations = [*({"activation": name} for name in ACTIVATIONS), *limits]
    if len(stacked) != 2:
        return
    for up, down in (stacked, stacked[::-1]):
        for bias in biases:
            for transposed in (False, True):
                for gating in GATINGS:
                    for options in activations:
                        literals = {"gating": gating, "transposed": transposed, **options}
                        yield Recipe((up, down, *bias), tuple(literals.items()))


def _limits(region: Region) -> list[float]:
    clamps = (n for n in region.nodes if n.target is aten.clamp.default)
    return sorted(
        {float(a) for n in clamps for a in n.args if isinstance(a, float | int) and a > 0}
    )


def _reference(region: Region, recipe: Recipe, values: Mapping[fx.Node, Tensor]) -> Tensor | None:
    parameters = [None if i is None else values[region.parameters[i]] for i in recipe.parameters]
    inputs = (values[region.tokens], values[region.index], values[region.weight])
    try:
        return moe.reference(*inputs, *parameters, **dict(recipe.literals))
    except EVALUATION_ERRORS:
        return None


def _apply(program: Program, region: Region, recipe: Recipe) -> None:
    parameters = [None if i is None else region.parameters[i] for i in recipe.parameters]
    args = (region.tokens, region.index, region.weight, *parameters)
    replace_by(program, region.output, moe.overload, args, dict(recipe.literals))
