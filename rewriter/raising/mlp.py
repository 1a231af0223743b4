"""Raise feed-forward blocks: plain, gated, and gated with one fused projection.

The anchor is a linear whose input comes, over pointwise and shape operators only, from one or two
other linears of one x. What lies between is run on random values and compared with every known
activation, so that its spelling does not matter; an unknown one is a miss that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rewriter.dialect import gated_mlp, mlp
from rewriter.dialect.mlp import ACTIVATIONS
from rewriter.engine.miss import Miss
from rewriter.program import Program
from rewriter.raising.evaluate import depends_on
from rewriter.raising.linear import Linear, as_linear
from rewriter.raising.region import agrees, region_key, replace_by, size_choices, strictness

__all__ = ["raise_mlp"]

aten = torch.ops.aten

_SHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.unflatten.int,
        aten.select.int,
        aten.flatten.using_ints,
        aten.clone.default,
        aten._to_copy.default,
    }
)
_NOT_ELEMENTWISE = frozenset({aten.softmax.int, aten._softmax.default, aten.cumsum.default})
_LARGEST = 40
"""Nodes of the longest activation that is still looked at."""


@dataclass(frozen=True)
class Shape:
    """What a feed-forward block computes between its projections.

    Attributes:
        activation: a key of `ACTIVATIONS`.
        gate: which of the two linears is activated; None for a plain block.
        fused: how the one linear's output is halved: "halves" or "pairs"; None for two linears.
    """

    activation: str
    gate: int | None = None
    fused: str | None = None


@dataclass
class Block:
    """A candidate: `down` applied to a region over one or two linears."""

    down: Linear
    ups: list[Linear]
    nodes: list[fx.Node]  # the region, without the linears, in graph order
    constants: list[fx.Node]


def raise_mlp(program: Program) -> list[Miss]:
    """Replace feed-forward blocks by `rewriter::gated_mlp` and `rewriter::mlp`."""
    depends: dict[fx.Node, frozenset[str]] = {}
    shapes: dict[Hashable, Shape | None] = {}
    misses: list[Miss] = []
    for node in list(program.graph.nodes):
        block = _block(node, depends)
        if block is None:
            continue
        stray = _stray_user(block)
        if stray is not None:
            misses.append(_miss(stray, "an intermediate value is also used outside of the block"))
            continue
        key = _key(block)
        if key not in shapes:
            shapes[key] = _recognise(program, block)
        shape = shapes[key]
        if shape is None:
            misses.append(_miss(block.nodes[0], _unknown(block)))
        else:
            _apply(program, block, shape)
    program.finish()
    return misses


def _miss(node: fx.Node, reason: str) -> Miss:
    return Miss.at(node, "raise-mlp", reason)


def _unknown(block: Block) -> str:
    names = ", ".join(str(node.target).removeprefix("aten.") for node in block.nodes[:6])
    return f"no known activation computes what stands between the projections ({names})"


def _block(node: fx.Node, depends: dict[fx.Node, frozenset[str]]) -> Block | None:
    """The candidate that ends in `node`; None where the data flow is not a feed-forward block's."""
    down = as_linear(node)
    if down is None:
        return None
    nodes: list[fx.Node] = []
    ups: list[Linear] = []
    constants: list[fx.Node] = []
    seen, stack = {down.x}, [down.x]
    while stack:
        current = stack.pop()
        value = current.meta.get("val")
        if isinstance(value, Tensor) and not depends_on(current, depends):
            constants.append(current)
            continue
        up = as_linear(current)
        if up is not None:
            ups.append(up)
            continue
        if not _is_pointwise(current) or len(nodes) > _LARGEST:
            return None
        nodes.append(current)
        operands = [n for n in current.all_input_nodes if n not in seen and not _is_size(n)]
        seen.update(operands)
        stack.extend(operands)
    ups.sort(key=lambda up: up.node)
    if not _plausible(nodes, ups) or _rows(node) != _rows(ups[0].x):
        return None
    return Block(down, ups, sorted(nodes), sorted(constants))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _is_pointwise(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target in _NOT_ELEMENTWISE:
        return False
    tags = getattr(node.target, "tags", ())
    return (
        node.target in _SHAPES
        or torch.Tag.pointwise in tags
        or getattr(node.target, "__name__", "") == "getitem"
        or node.target in (aten.silu.default, aten.glu.default, aten.mish.default)
    )


def _plausible(nodes: Sequence[fx.Node], ups: Sequence[Linear]) -> bool:
    """One or two linears of one input, and something that is not linear behind them."""
    if not 1 <= len(ups) <= 2 or any(up.x is not ups[0].x for up in ups):
        return False
    return any(node.target not in _SHAPES and not _is_getitem(node) for node in nodes)


def _rows(node: fx.Node) -> list[str]:
    return [str(extent) for extent in node.meta["val"].shape[:-1]]


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _stray_user(block: Block) -> fx.Node | None:
    """A user of an intermediate value that is not part of the block."""
    inside = {*block.nodes, block.down.node}
    values = [*(up.node for up in block.ups), *block.nodes]
    users = (user for node in values for user in node.users if user not in inside)
    return next((user for user in users if not str(user.target).startswith("aten.sym_size")), None)


def _key(block: Block) -> Hashable:
    return region_key([*(up.node for up in block.ups), *block.nodes, block.down.node])


def _recognise(program: Program, block: Block) -> Shape | None:
    """The first reading of the block that agrees with it on random values."""
    inputs = [*(up.node for up in block.ups), *block.constants]
    sizes = size_choices([block.down.x, *inputs])
    for exact in strictness(inputs):
        for shape in _readings(block):

            def hypothesis(values: Mapping[fx.Node, Tensor], shape: Shape = shape) -> Tensor:
                return _between([values[up.node] for up in block.ups], shape)

            if agrees(
                program, block.down.x, inputs, hypothesis, sizes=sizes, rows=True, exact=exact
            ):
                return shape
    return None


def _readings(block: Block) -> Iterator[Shape]:
    """Every shape that a block with so many linears can have."""
    for activation in ACTIVATIONS:
        if len(block.ups) == 2:
            yield from (Shape(activation, gate) for gate in (0, 1))
            continue
        yield Shape(activation)
        for fused in _HALVES:
            yield from (Shape(activation, gate, fused) for gate in (0, 1))


def _between(outputs: Sequence[Tensor], shape: Shape) -> Tensor:
    """The input of the down projection under a hypothesis."""
    activation = ACTIVATIONS[shape.activation]
    if shape.gate is None:
        return activation(outputs[0])
    if shape.fused is not None:
        parts = _HALVES[shape.fused](outputs[0].shape[-1])
        outputs = [outputs[0][..., part] for part in parts]
    return activation(outputs[shape.gate]) * outputs[1 - shape.gate]


_HALVES: dict[str, Callable[[int], tuple[slice, slice]]] = {
    "halves": lambda width: (slice(0, width // 2), slice(width // 2, width)),
    "pairs": lambda width: (slice(0, None, 2), slice(1, None, 2)),
}
"""How a fused projection's output is divided in two."""


def _apply(program: Program, block: Block, shape: Shape) -> None:
    """Put the dialect operator in the place of the down projection."""
    down, whole = block.down, slice(None)
    parts = [whole, whole]
    ups = block.ups if len(block.ups) == 2 else block.ups * 2
    if shape.fused is not None:
        parts = list(_HALVES[shape.fused](ups[0].node.meta["val"].shape[-1]))
    weights = [up.weight_part(program, part) for up, part in zip(ups, parts, strict=True)]
    biases = [up.bias_part(program, part) for up, part in zip(ups, parts, strict=True)]
    down_weight, down_bias = down.weight_part(program, whole), down.bias
    if shape.gate is None:
        args = (ups[0].x, weights[0], down_weight, biases[0], down_bias)
        target = mlp.overload
    else:
        order = (shape.gate, 1 - shape.gate)
        gate_up, gate_up_biases = [weights[i] for i in order], [biases[i] for i in order]
        args = (ups[0].x, *gate_up, down_weight, *gate_up_biases, down_bias)
        target = gated_mlp.overload
    replace_by(program, down.node, target, args, {"activation": shape.activation})
