"""Pointwise operators: put off until their result is needed, then one loop for all of a chain.

A product with a weight is put off too: pointwise work on it that nothing else reads becomes part of
the product, applied to each row as it is finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from codegen.epilogue import cpp_constant
from codegen.pointwise import FUNCTIONS, Call, translate
from codegen.step.probe import TensorFact
from codegen.step.share import SHARE_FLOATS
from codegen.step.text import Parameters
from codegen.step.value import Refusal, Value, contiguous_strides

if TYPE_CHECKING:
    from codegen.step.plan import Planner

__all__ = ["Expression", "Product", "emit_copy", "emit_expression", "stored", "why_not_pointwise"]

aten = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)
_CASTS = (aten._to_copy.default, aten.to.dtype)


@dataclass(frozen=True)
class Expression:
    """The result of a pointwise node that was not computed yet."""

    node: fx.Node


@dataclass(frozen=True)
class Product:
    """The result of a product with a weight that was not computed yet.

    Attributes:
        emit: appends the phase, given its parameters and C++ statements that store the float `value` of
            output `row` of input row `m`.
    """

    node: fx.Node
    emit: Callable[[Parameters, str], None]


def why_not_pointwise(plan: Planner, node: fx.Node) -> str | None:
    """Why a node cannot become part of a loop; None where it can."""
    fact = plan.facts.get(node)
    if isinstance(fact, tuple):
        return "it gives several results"
    if not isinstance(fact, TensorFact) or not all(isinstance(e, int) for e in fact.shape):
        return "its shape is not known, or grows"
    if not all(isinstance(plan.facts.get(n), TensorFact) for n in node.all_input_nodes):
        return "it reads what is not a tensor"
    if fact.dtype not in (*_FLOATS, torch.bool):
        return f"it gives {fact.dtype}"
    if any(plan.is_mutable(n) for n in node.all_input_nodes):
        return "it reads state, which may change before the result is needed"
    calls = _calls(plan, node)
    return calls if isinstance(calls, str) else None


def _calls(plan: Planner, node: fx.Node) -> tuple[Call, ...] | str:
    """As `translate`, with dtypes from what is known of this step."""
    source = node.args[0] if node.args else None
    facts = [plan.facts.get(n) for n in node.all_input_nodes]
    whole = any(isinstance(f, TensorFact) and f.dtype in _INTEGERS for f in facts)
    if node.target in _CASTS and isinstance(source, fx.Node):
        return _cast(source, plan.fact(source).dtype, plan.fact(node).dtype)
    return "it computes with integers" if whole else translate(node)


def _cast(source: fx.Node, before: torch.dtype, after: torch.dtype) -> tuple[Call, ...] | str:
    if before == after or (after == torch.float32 and before != torch.bool):
        return (Call("copy", (source,)),)
    if before == torch.bool and after in _FLOATS:
        return (Call("float_of_bool", (source,)),)
    if before == torch.float32 and after == torch.bfloat16:
        return (Call("round_bfloat16", (source,)),)
    return f"it casts {before} to {after}"


class _Group:
    """A node with all it reads that nothing else does."""

    def __init__(self, plan: Planner, node: fx.Node) -> None:
        self.plan, self.root = plan, node
        self.shape = Value.fixed_shape.fget(plan_value(plan, node))  # pyright: ignore
        self.product: Product | None = None
        self.nodes: list[fx.Node] = []
        self.leaves: dict[fx.Node, Value] = {}
        value = plan.values[node]
        if isinstance(value, Product):
            self.product = value
        else:
            self._add(node)

    def _add(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in self.leaves or source in self.nodes:
                continue
            value = self.plan.values.get(source)
            alone = len(source.users) == 1
            if isinstance(value, Expression) and alone:
                self._add(source)
            elif isinstance(value, Product) and alone and self._takes(value):
                self.product = value
            else:
                self.leaves[source] = self.plan.tensor(source)
        self.nodes.append(node)

    def _takes(self, product: Product) -> bool:
        return self.product is None and self.plan.fact(product.node).shape == self.shape

    def statements(self, names: dict[fx.Node, str]) -> tuple[list[str], str]:
        """C++ statements from the leaves' names to the result, and the result's name."""
        lines: list[str] = []
        for node in self.nodes:
            result = ""
            calls = _calls(self.plan, node)
            assert not isinstance(calls, str)
            for call in calls:
                given = [_shown(argument, names, result) for argument in call.arguments]
                if call.function == "copy":
                    result = given[0]
                    continue
                function = FUNCTIONS[call.function]
                result = f"t{len(lines)}"
                kind = "bool" if function.is_bool else "float"
                lines.append(f"const {kind} {result} = {function.cpp.format(*given)};")
            names[node] = result
        last = self.nodes[-1] if self.nodes else None
        return lines, names[last] if last is not None else "value"


def _shown(argument: Any, names: dict[fx.Node, str], previous: str) -> str:
    if argument is Call.PREVIOUS:
        return previous
    return names[argument] if isinstance(argument, fx.Node) else cpp_constant(float(argument))


def plan_value(plan: Planner, node: fx.Node) -> Value:
    """A stand-in with the shape of a node."""
    fact = plan.fact(node)
    from codegen.step.value import Place

    return Value(Place(None), fact.shape, contiguous_strides(fact.shape), fact.dtype)


def stored(dtype: torch.dtype, name: str) -> str:
    """The float that stands for a result of this dtype: rounded, as the graph would."""
    return f"rw::to_float(rw::round_bf16({name}))" if dtype == torch.bfloat16 else name


def emit_expression(plan: Planner, node: fx.Node) -> Value:
    """Compute a put-off node into the arena."""
    group = _Group(plan, node)
    result = plan.new(node)
    parameters = Parameters()
    if group.product is None:
        _loop(plan, group, result, parameters)
        return result
    width = group.shape[-1]
    out = parameters.write(result)
    names = {group.product.node: "value"}
    loads = []
    for i, (leaf, value) in enumerate(group.leaves.items()):
        names[leaf] = f"x{i}"
        loads.append(_load(f"x{i}", parameters.read(value), value, _product_index(value, width)))
    lines, last = group.statements(names)
    store = f"{out}[m * {width} + row] = {stored(result.dtype, last)};"
    group.product.emit(parameters, "\n".join([*loads, *lines, store]))
    return result


def _product_index(value: Value, width: int) -> str:
    """Where a leaf broadcast over [..., width] lies for input row m and output row `row`."""
    shape = value.fixed_shape
    lead, last = shape[:-1], shape[-1] if shape else 1
    rows = value.expanded(value.shape).reshaped((math.prod(lead), last))
    if rows is None:
        raise Refusal("an operand that one stride a row cannot describe")
    m = "" if rows.shape[0] == 1 else f"m * {rows.strides[0]}"
    row = "" if rows.shape[1] == 1 else f"row * {rows.strides[1]}"
    return " + ".join(part for part in (m, row) if part) or "0"


def _load(name: str, pointer: str, value: Value, index: str) -> str:
    whole = value.place.element in ("int64_t", "int32_t", "bool")
    convert = "float" if whole else "rw::to_float"
    return f"const float {name} = {convert}({pointer}[{index}]);"


def _loop(plan: Planner, group: _Group, result: Value, parameters: Parameters) -> None:
    """Loops over the result's dimensions, the first of them shared among threads."""
    out = parameters.write(result)
    names: dict[fx.Node, str] = {}
    operands = [(out, result)]
    for i, (leaf, value) in enumerate(group.leaves.items()):
        names[leaf] = f"x{i}"
        operands.append((parameters.read(value), value.expanded(result.shape)))
    dims = _collapsed(group.shape, [value for _, value in operands])
    loads = [
        _load(f"x{i}", pointer, value, _index(dims, i + 1))
        for i, (pointer, value) in enumerate(operands[1:])
    ]
    lines, last = group.statements(names)
    body = [*loads, *lines, f"{out}[{_index(dims, 0)}] = {stored(result.dtype, last)};"]
    plan.phase(group.root, group.root.name, _loops(dims, body), parameters, "functions.h", "vec.h")


def emit_copy(plan: Planner, value: Value, node: fx.Node) -> Value:
    """A row-major copy of a strided tensor."""
    result = plan.room(value.shape, value.dtype)
    parameters = Parameters()
    out, pointer = parameters.write(result), parameters.read(value)
    dims = _collapsed(value.fixed_shape, [result, value])
    body = [_load("x", pointer, value, _index(dims, 1)), f"{out}[{_index(dims, 0)}] = x;"]
    shares = plan.shares_of(math.prod(value.fixed_shape), SHARE_FLOATS)
    plan.phase(node, "copy", _loops(dims, body), parameters, "vec.h", shares=shares)
    return result


Dims = list[tuple[int, list[Any]]]
"""Extent of each loop, from the outermost, and the stride of each operand in it."""


def _collapsed(shape: tuple[int, ...], operands: list[Value]) -> Dims:
    """As few loops as the operands' strides allow."""
    dims: Dims = []
    for i, extent in enumerate(shape):
        if extent == 1:
            continue
        strides = [value.strides[i] for value in operands]
        if dims:
            outer, before = dims[-1]
            both = zip(strides, before, strict=True)
            if all(isinstance(s, int) and b == s * extent for s, b in both):
                dims[-1] = (outer * extent, strides)
                continue
        dims.append((extent, strides))
    return dims or [(1, [0] * len(operands))]


def _index(dims: Dims, operand: int) -> str:
    terms = [f"i{d} * {strides[operand]}" for d, (_, strides) in enumerate(dims)]
    kept = [t for t, (_, strides) in zip(terms, dims, strict=True) if strides[operand] != 0]
    return " + ".join(kept).replace(" * 1 +", " +").removesuffix(" * 1") or "0"


def _loops(dims: Dims, body: list[str]) -> str:
    first = dims[0][0]
    block = 16 if len(dims) == 1 else 1
    lines = [f"const rw::Range mine = rw::share({first}, thread, num_threads, {block});"]
    lines.append("for (int64_t i0 = mine.begin; i0 < mine.end; ++i0)")
    for d, (extent, _) in enumerate(dims[1:], start=1):
        lines.append(f"for (int64_t i{d} = 0; i{d} < {extent}; ++i{d})")
    return "\n".join([*lines[:-1], lines[-1] + " {", *(f"    {line}" for line in body), "}"])
