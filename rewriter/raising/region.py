"""A region under test: compare it with a hypothesis on random values, replace it, name it.

Regions are compared twice: widened to fp32, where two functions that differ cannot hide behind
rounding, and in the model's own dtype, where the order of casts shows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.program import Program
from rewriter.raising.evaluate import concrete, evaluate, free_symbols, random_value

__all__ = [
    "agrees",
    "close",
    "random_bindings",
    "region_key",
    "replace_by",
    "size_choices",
    "strictness",
]

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,  # roundings of another order; a wrong formula is off by 1e-3 and more
    torch.bfloat16: 2**-7,  # one unit in the last place
    torch.float16: 2**-10,
}
"""Largest accepted difference, relative to the value and to the largest value's own rounding."""

_EXTENTS = ((2, 5, 3, 4), (3, 7, 2, 5))
_GROWTH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EVALUATION_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError)
"""What running a wrong hypothesis can raise: shapes that do not fit, unbound symbols."""


def size_choices(nodes: Iterable[fx.Node]) -> list[dict[str, int]]:
    """Two assignments of distinct small extents to every symbol in the shapes of `nodes`.

    They grow until every dynamic extent is 2 or more: strided convolutions leave nothing of short
    sequences, and on empty tensors any hypothesis holds.
    """
    nodes = list(nodes)
    names = sorted({name for node in nodes for name in free_symbols(node)})
    return [_large_enough(nodes, names, extents) for extents in _EXTENTS]


def _large_enough(
    nodes: Sequence[fx.Node], names: Sequence[str], extents: Sequence[int]
) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for growth in _GROWTH:
        sizes = {
            name: (extents[i % len(extents)] + i // len(extents)) * growth
            for i, name in enumerate(names)
        }
        if all(extent >= 2 for node in nodes for extent in _dynamic_extents(node, sizes)):
            break
    return sizes


def _dynamic_extents(node: fx.Node, sizes: Mapping[str, int]) -> list[int]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return []
    dynamic = (e for e in value.shape if isinstance(e, torch.SymInt) and e.node.expr.free_symbols)
    return [concrete(extent, sizes) for extent in dynamic]


def random_bindings(
    nodes: Sequence[fx.Node], sizes: Mapping[str, int], seed: int
) -> dict[fx.Node, Tensor]:
    """A random value for every node of `nodes`."""
    generator = torch.Generator().manual_seed(seed)
    return {node: random_value(node, sizes, generator) for node in nodes}


def close(actual: Any, expected: Any) -> bool:
    """Whether two tensors agree to the rounding of their dtype; shape and dtype must be equal.

    Empty tensors do not: they are no evidence.
    """
    if not isinstance(actual, Tensor) or not isinstance(expected, Tensor):
        return False
    if not expected.numel():
        return False
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    tolerance = TOLERANCES[expected.dtype]
    wide, reference = actual.double(), expected.double()
    scale = reference.abs().amax()
    allowed = tolerance * (reference.abs() + 0.25 * scale)
    return bool(((wide - reference).abs() <= allowed).all())


def agrees(
    program: Program,
    output: fx.Node,
    inputs: Sequence[fx.Node],
    hypothesis: Callable[[Mapping[fx.Node, Tensor]], Tensor],
    *,
    sizes: Sequence[Mapping[str, int]],
    rows: bool = False,
    exact: bool = False,
) -> bool:
    """Whether `output`, as a function of `inputs`, equals the hypothesis on random values.

    Args:
        inputs: nodes that get random values; everything else `output` needs must follow from them.
        hypothesis: from the values of `inputs` to the expected output.
        sizes: extents of the symbols, one trial each.
        rows: compare as matrices of the last dimension, however the rows are arranged.
        exact: in the model's own dtype every bit has to agree.
    """
    narrow = any(_is_narrow(node) for node in (*inputs, output))
    for seed, extents in enumerate(sizes):
        for widen in (True, False) if narrow else (False,):
            values = random_bindings(inputs, extents, seed)
            values = {node: _widened(v) for node, v in values.items()} if widen else values
            try:
                (actual,) = evaluate(program, [output], values, sizes=extents, widen=widen)
                expected = hypothesis(values)
            except EVALUATION_ERRORS:
                return False
            if rows:
                actual, expected = (t.reshape(-1, t.shape[-1]) for t in (actual, expected))
            if not (_same if exact and not widen else close)(expected, actual):
                return False
    return True


def strictness(nodes: Iterable[fx.Node]) -> tuple[bool, ...]:
    """Values of `exact` to try in turn: in 16 bits, look for an order of casts with equal bits."""
    return (True, False) if any(_is_narrow(node) for node in nodes) else (False,)


def _same(actual: Any, expected: Any) -> bool:
    return isinstance(actual, Tensor) and close(actual, expected) and torch.equal(actual, expected)


def _is_narrow(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def region_key(nodes: Sequence[fx.Node], shared: Iterable[fx.Node] = ()) -> Hashable:
    """Equal for regions of the same structure: operators, wiring, literals, shapes and dtypes.

    Args:
        nodes: the region, operands before users.
        shared: operands from outside that count by identity (tables); others count by shape.
    """
    index = {node: i for i, node in enumerate(nodes)}
    same = set(shared)
    outside: dict[fx.Node, int] = {}

    def name(node: fx.Node) -> str:
        if node in index:
            return f"%{index[node]}"
        if node in same:
            return f"@{node.name}"
        return f"${outside.setdefault(node, len(outside))}:{_type(node)}"

    return tuple(
        (str(n.target), repr(fx.map_arg(n.args, name)), repr(fx.map_arg(n.kwargs, name)), _type(n))
        if n.op != "get_attr"
        else ("get_attr", _type(n))
        for n in nodes
    )


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else str(value)


def replace_by(
    program: Program,
    old: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> fx.Node:
    """Put a call in the place of `old`, with its metadata; dead-code elimination removes `old`."""
    with program.graph.inserting_before(old):
        new = program.graph.call_function(target, args, kwargs)
    new.meta = {**old.meta, "raised_from": old.name}
    old.replace_all_uses_with(new)
    return new
