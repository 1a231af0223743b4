"""Run a part of a graph on chosen values: how recognisers decide what a region means.

Only the ancestors of the wanted nodes run, and only up to nodes whose value is given. Sizes are
not values: `sym_size` and constructors such as `zeros_like` need no data, only the extents, which
are read off the bound tensors or given by symbol.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.errors import RewriterError
from rewriter.program import Program

__all__ = [
    "UnboundInput",
    "attribute",
    "concrete_shape",
    "depends_on",
    "evaluate",
    "free_symbols",
    "needed",
    "random_value",
    "sizes_of",
]

aten = torch.ops.aten

Value = Any
Sizes = dict[str, int]
"""Extent of every dynamic dimension by the name of its symbol, e.g. `{"s43": 2, "s70": 7}`."""

NARROW = frozenset({torch.bfloat16, torch.float16})

SIZE_QUERIES = frozenset(
    {
        aten.sym_size.int,
        aten.sym_numel.default,
        aten.sym_stride.int,
        aten.sym_storage_offset.default,
    }
)
SHAPE_ONLY = SIZE_QUERIES | frozenset(
    {
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
    }
)
"""Operators whose result depends on the extents of their first argument and not on its values."""


class UnboundInput(RewriterError):
    """Evaluation reached a placeholder without a value."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(f"evaluation needs a value for placeholder {node.name!r}")
        self.node = node


def evaluate(
    program: Program,
    nodes: Sequence[fx.Node],
    bindings: Mapping[fx.Node, Value],
    *,
    sizes: Mapping[str, int] | None = None,
    widen: bool = False,
) -> list[Value]:
    """Values of `nodes`, interpreting only their ancestors up to bound nodes.

    Args:
        program: supplies the weights and buffers that `get_attr` nodes name.
        nodes: what to compute, all of one graph.
        bindings: values of nodes; their own ancestors do not run.
        sizes: extents by symbol; those of bound tensors are read off the tensors.
        widen: read every bf16 and fp16 in the graph as fp32, so that rounding hides nothing.

    Raises:
        UnboundInput: a placeholder without a value was reached.
    """
    known = {**sizes_of(bindings), **(sizes or {})}
    values: dict[fx.Node, Value] = dict(bindings)
    with torch.no_grad():
        for node in needed(nodes, bindings):
            values[node] = _compute(program, node, values, known, widen)
    return [values[node] for node in nodes]


def needed(nodes: Sequence[fx.Node], bound: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Ancestors of `nodes`, themselves included, that have to run; operands before users."""
    order: list[fx.Node] = []
    seen = set[fx.Node]()
    stack = [(node, False) for node in reversed(nodes)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen and node not in bound:
            seen.add(node)
            stack.append((node, True))
            stack.extend((operand, False) for operand in _operands(node, bound))
    return order


def _operands(node: fx.Node, bound: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Operands that have to run; a shape-only operator needs its tensor only if it is bound."""
    if node.target not in SHAPE_ONLY:
        return node.all_input_nodes
    source = node.args[0]
    return [
        operand for operand in node.all_input_nodes if operand is not source or operand in bound
    ]


def _compute(
    program: Program, node: fx.Node, values: dict[fx.Node, Value], sizes: Sizes, widen: bool
) -> Value:
    if node.op == "get_attr":
        value = attribute(program, node)
        return value.float() if widen and value.dtype in NARROW else value
    if node.op == "placeholder":
        raise UnboundInput(node)
    if node.target in SHAPE_ONLY:
        return _compute_shape_only(node, values, sizes)
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    if widen:
        args = tuple(_wide(argument) for argument in args)
        kwargs = {key: _wide(argument) for key, argument in kwargs.items()}
    if node.op == "call_function":
        return _callable(node)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return program.module.get_submodule(str(node.target))(*args, **kwargs)


def _wide(argument: Value) -> Value:
    is_dtype = isinstance(argument, torch.dtype)
    return torch.float32 if is_dtype and argument in NARROW else argument


def _compute_shape_only(node: fx.Node, values: dict[fx.Node, Value], sizes: Sizes) -> Value:
    source = node.args[0]
    if not isinstance(source, fx.Node) or source in values:
        tensor = values[source] if isinstance(source, fx.Node) else source
    else:
        if node.target in SIZE_QUERIES:
            return concrete(node.meta["val"], sizes)
        tensor = torch.empty(concrete_shape(source, sizes), dtype=source.meta["val"].dtype)
    rest = fx.map_arg(node.args[1:], values.__getitem__)
    return _callable(node)(tensor, *rest, **fx.map_arg(node.kwargs, values.__getitem__))


def _callable(node: fx.Node) -> Callable[..., Value]:
    if not callable(node.target):
        raise TypeError(f"node {node.name!r} does not call a function")
    return node.target


def attribute(program: Program, node: fx.Node) -> Value:
    """The parameter, buffer or constant that a `get_attr` node names."""
    return operator.attrgetter(str(node.target))(program.module)


def depends_on(node: fx.Node, cache: dict[fx.Node, frozenset[str]]) -> frozenset[str]:
    """Names of the placeholders whose values (not sizes) the node depends on.

    Args:
        cache: filled as the graph is walked; share one over the calls on an unchanged graph.
    """
    for current in needed([node], cache):
        if current.op == "placeholder":
            cache[current] = frozenset({current.name})
            continue
        values = [o for o in _value_operands(current) if o in cache]
        cache[current] = frozenset().union(*(cache[operand] for operand in values))
    return cache[node]


def _value_operands(node: fx.Node) -> list[fx.Node]:
    if node.target not in SHAPE_ONLY:
        return node.all_input_nodes
    return [operand for operand in node.all_input_nodes if operand is not node.args[0]]


def free_symbols(node: fx.Node) -> set[str]:
    """Names of the symbols in the shape of the node's value."""
    value = node.meta.get("val")
    extents = value.shape if isinstance(value, Tensor) else (value,)
    return {
        str(symbol)
        for extent in extents
        if isinstance(extent, torch.SymInt)
        for symbol in extent.node.expr.free_symbols
    }


def sizes_of(bindings: Mapping[fx.Node, Value]) -> Sizes:
    """Extents of the dynamic dimensions, read off the tensors that nodes are bound to."""
    sizes: Sizes = {}
    for node, value in bindings.items():
        expected = node.meta.get("val")
        if not isinstance(expected, Tensor) or not isinstance(value, Tensor):
            continue
        for extent, actual in zip(expected.shape, value.shape, strict=False):
            if isinstance(extent, torch.SymInt):
                sizes.setdefault(str(extent.node.expr), int(actual))
    return sizes


def concrete(extent: Any, sizes: Mapping[str, int]) -> int:
    """A size, symbolic or not, as a number. Raises KeyError for a symbol that `sizes` lacks."""
    if not isinstance(extent, torch.SymInt):
        return int(extent)
    expression = extent.node.expr
    if str(expression) in sizes:
        return sizes[str(expression)]
    return int(expression.subs({symbol: sizes[str(symbol)] for symbol in expression.free_symbols}))


def concrete_shape(node: fx.Node, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of the node's value with every symbol replaced by its extent in `sizes`."""
    return tuple(concrete(extent, sizes) for extent in node.meta["val"].shape)


def random_value(node: fx.Node, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    """A random tensor of the node's dtype and concrete shape; integers are small, not negative."""
    value = node.meta["val"]
    shape = concrete_shape(node, sizes)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        wide = torch.complex64 if value.dtype.is_complex else torch.float32
        return torch.randn(shape, generator=generator, dtype=wide).to(value.dtype)
    if value.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    return torch.randint(0, 8, shape, generator=generator, dtype=value.dtype)
