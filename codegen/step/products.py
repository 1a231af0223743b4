"""Products with weights and feed-forward blocks of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from codegen.step.pointwise import Product, stored
from codegen.step.share import SHARE_BYTES
from codegen.step.text import Parameters
from codegen.step.value import Refusal, Value
from rewriter.dialect import OPS

if TYPE_CHECKING:
    from codegen.step.plan import Planner

__all__ = ["MAX_ROWS", "emit_dequantize_rows", "emit_gated_mlp", "emit_linear", "emit_mlp"]

MAX_ROWS = 8
"""Most input rows of a product; for more of them a step is not the place."""

_ACTIVATIONS = {
    "silu": "rw::silu({0})",
    "gelu": "rw::gelu({0})",
    "gelu_tanh": "rw::gelu_tanh({0})",
    "quick_gelu": "rw::quick_gelu({0})",
    "relu": "rw::relu({0})",
    "relu_squared": "rw::relu({0}) * rw::relu({0})",
    "sigmoid": "rw::sigmoid({0})",
    "tanh": "rw::tanh_({0})",
    "identity": "{0}",
}


class _Matrix:
    """A weight [rows, columns] with what each of its products is multiplied by and added to."""

    def __init__(self, plan: Planner, weight: Any, bias: Any = None) -> None:
        is_node = isinstance(weight, fx.Node)
        narrow = is_node and weight.target is OPS["dequantize_rows"].overload
        weight, scale = weight.args if narrow else (weight, None)
        self.scale = None if scale is None else plan.contiguous(scale)
        self.weight = plan.tensor(weight)
        if len(self.weight.shape) != 2 or self.weight.strides[1] != 1:
            raise Refusal("a weight whose rows are not contiguous")
        self.rows, self.columns = self.weight.fixed_shape
        self.stride = self.weight.strides[0]
        self.bias = None if bias is None else plan.contiguous(bias)
        self.others = plan.threads - 1

    def operands(self, parameters: Parameters) -> tuple[str, str]:
        """Its pointer, and C++ of the finished product from `{0}`, at output `row`."""
        pointer, value = parameters.read(self.weight), "{0}"
        if self.scale is not None:
            value += f" * rw::to_float({parameters.read(self.scale)}[row])"
        if self.bias is not None:
            value += f" + rw::to_float({parameters.read(self.bias)}[row])"
        return pointer, value

    def shares(self, plan: Planner) -> int:
        """Of its rows."""
        element = {"float": 4, "rw::bf16": 2}.get(self.weight.place.element, 1)
        return plan.shares_of(self.rows * self.columns * element, SHARE_BYTES)

    def call(self, x: str, m: int, pointer: str, out: str) -> str:
        """C++ of the product with x [m, columns]; `out` has statements of row, m and value."""
        body = "\n".join(f"    {line}" for line in out.splitlines())
        return (
            f"rw::gemm_rows<{m}>({pointer}, {self.stride}, {x}, {self.columns}, {self.rows},"
            f" {self.columns}, [&](int64_t row, int m, float value) {{\n{body}\n"
            f"}}, thread, num_threads, {self.others});"
        )


def _rows(x: Value) -> int:
    """Input rows. Raises Refusal where there are too many."""
    count = 1
    for extent in x.fixed_shape[:-1]:
        count *= extent
    if not 1 <= count <= MAX_ROWS:
        raise Refusal(f"{count} rows, 1 to {MAX_ROWS} are allowed")
    return count


def emit_dequantize_rows(plan: Planner, node: fx.Node) -> None:
    """Nothing: a product reads the int8 rows themselves. PyTorch makes them wide for anything else."""


def emit_linear(plan: Planner, node: fx.Node) -> Product:
    """x weightᵀ + bias, put off so that pointwise work can join."""
    x, weight, bias = (*node.args, None)[:3]
    return _product(plan, node, plan.in_arena(x), _Matrix(plan, weight, bias))


def _product(plan: Planner, node: fx.Node, x: Value, matrix: _Matrix) -> Product:
    m = _rows(x)

    def emit(parameters: Parameters, out: str) -> None:
        pointer, value = matrix.operands(parameters)
        given = parameters.read(x)
        body = matrix.call(given, m, pointer, _finished(value, torch.float32) + out)
        shares = matrix.shares(plan)
        plan.phase(node, "linear", body, parameters, "gemv.h", "functions.h", shares=shares)

    return Product(node, emit)


def emit_gated_mlp(plan: Planner, node: fx.Node) -> Product:
    """down(activation(gate(x)) · up(x)): one phase for gate and up, then a product like any other."""
    x, gate, up, down, gate_bias, up_bias, down_bias = (*node.args, None, None, None)[:7]
    activation = _activation(node)
    given, dtype = plan.in_arena(x), plan.fact(node).dtype
    m = _rows(given)
    first, second = _Matrix(plan, gate, gate_bias), _Matrix(plan, up, up_bias)
    lead = given.fixed_shape[:-1]
    gated = plan.room((*lead, first.rows), dtype)
    hidden = plan.room((*lead, first.rows), dtype)
    parameters = Parameters()
    source, a, h = parameters.read(given), parameters.write(gated), parameters.write(hidden)
    (gate_at, gate_value), (up_at, up_value) = (w.operands(parameters) for w in (first, second))
    at = f"[m * {first.rows} + row]"
    active = stored(dtype, activation.format("value"))
    keep = _finished(gate_value, dtype) + f"{a}{at} = {active};"
    join = _finished(up_value, dtype) + f"{h}{at} = {stored(dtype, f'{a}{at} * value')};"
    body = first.call(source, m, gate_at, keep) + "\n" + second.call(source, m, up_at, join)
    shares = first.shares(plan)
    plan.phase(node, "gate_up", body, parameters, "gemv.h", "functions.h", shares=shares)
    return _product(plan, node, hidden, _Matrix(plan, down, down_bias))


def emit_mlp(plan: Planner, node: fx.Node) -> Product:
    """down(activation(up(x)))."""
    x, up, down, up_bias, down_bias = (*node.args, None, None)[:5]
    activation = _activation(node)
    given, dtype = plan.in_arena(x), plan.fact(node).dtype
    matrix = _Matrix(plan, up, up_bias)
    hidden = plan.room((*given.fixed_shape[:-1], matrix.rows), dtype)
    parameters = Parameters()
    source, h = parameters.read(given), parameters.write(hidden)
    pointer, value = matrix.operands(parameters)
    active = stored(dtype, activation.format("value"))
    out = _finished(value, dtype) + f"{h}[m * {matrix.rows} + row] = {active};"
    body = matrix.call(source, _rows(given), pointer, out)
    shares = matrix.shares(plan)
    plan.phase(node, "up", body, parameters, "gemv.h", "functions.h", shares=shares)
    return _product(plan, node, hidden, _Matrix(plan, down, down_bias))


def _finished(value: str, dtype: torch.dtype) -> str:
    """Statements that make `value` the finished product, rounded to a dtype; none where it is."""
    text = stored(dtype, value.format("value"))
    return "" if text == "value" else f"value = {text};\n"


def _activation(node: fx.Node) -> str:
    name = node.kwargs.get("activation")
    if name not in _ACTIVATIONS:
        raise Refusal(f"activation {name!r}")
    return _ACTIVATIONS[str(name)]
