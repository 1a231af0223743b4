"""Experts as a Loop: the operator that stands for them is replaced once the graph is complete."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from codegen.onnx_functions.moe import EXPERTS, ExpertStep
from rewriter.export.onnx_trace import torch_dtype, trace, translate
from rewriter.export.ports import Port

__all__ = ["expand_experts"]


def expand_experts(model: ir.Model) -> int:
    """Replace every `rewriter::Experts`; bodies of the same shape are traced once.

    Returns:
        how many there were.
    """
    bodies: dict[str, ir.Graph] = {}
    found = [node for node in model.graph if (node.domain, node.op_type) == ("rewriter", EXPERTS)]
    for index, node in enumerate(found):
        key = str([(v.dtype, v.shape) for v in node.inputs if v is not None]) + str(_options(node))
        if key not in bodies:
            bodies[key] = _traced(node)
        _replace(model.graph, node, bodies[key], f"experts_{index}")
    if found:
        model.opset_imports.pop("rewriter", None)
    return len(found)


def _options(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _traced(node: ir.Node) -> ir.Graph:
    """One turn of the loop: `ExpertStep` on inputs like those of the node."""
    ports = [_port(f"input_{i}", value) for i, value in enumerate(node.inputs) if value is not None]
    total = Port("total", ports[0].dtype, ports[0].dims)
    inputs = [total, Port("expert", torch.int64, ()), *ports]
    out = Port("out", total.dtype, total.dims)
    return translate(trace(ExpertStep(_options(node)), inputs), inputs, [out]).graph


def _port(name: str, value: ir.Value) -> Port:
    assert value.shape is not None and value.dtype is not None
    dims = tuple(d if isinstance(d, int) else "tokens" for d in value.shape)
    return Port(name, torch_dtype(value.dtype), dims)


def _replace(graph: ir.Graph, node: ir.Node, body: ir.Graph, name: str) -> None:
    x, expert_index = node.inputs[:2]
    flat = ir.node("Reshape", [expert_index, _constant(graph, f"{name}_all", [-1])])
    experts = ir.node("Unique", [flat.outputs[0]], {"sorted": 1})
    count = ir.node("Size", [experts.outputs[0]])
    zero = ir.node("Sub", [x, x])
    loop = ir.node(
        "Loop",
        [count.outputs[0], None, zero.outputs[0]],
        {"body": _body(node, body, experts.outputs[0], name)},
        name=name,
    )
    graph.insert_before(node, [flat, experts, count, zero, loop])
    old, new = node.outputs[0], loop.outputs[0]
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)
    graph.remove(node, safe=True)


def _body(node: ir.Node, traced: ir.Graph, experts: ir.Value, name: str) -> ir.Graph:
    """The traced turn with the loop's own inputs; everything else is read from around it."""
    turn, going = (
        _value(f"{name}_turn", ir.DataType.INT64),
        _value(f"{name}_going", ir.DataType.BOOL),
    )
    total = ir.Value(name=f"{name}_total", type=traced.inputs[0].type)
    expert = ir.node("Gather", [experts, turn], {"axis": 0})
    expert.outputs[0].name = f"{name}_expert"
    goes_on = ir.node("Identity", [going])
    goes_on.outputs[0].name = f"{name}_goes_on"
    given = [total, expert.outputs[0], *(v for v in node.inputs if v is not None)]
    known: dict[ir.Value, ir.Value] = dict(zip(traced.inputs, given, strict=True))
    nodes = [expert, goes_on]
    for value in traced.initializers.values():
        constant = ir.node("Constant", [], {"value": value.const_value})
        constant.outputs[0].name = f"{name}_{value.name}"
        known[value] = constant.outputs[0]
        nodes.append(constant)
    for old in traced:
        copy = ir.Node(
            old.domain,
            old.op_type,
            [None if value is None else known[value] for value in old.inputs],
            list(old.attributes.values()),
            num_outputs=len(old.outputs),
        )
        for before, after in zip(old.outputs, copy.outputs, strict=True):
            after.name, known[before] = f"{name}_{before.name}", after
        nodes.append(copy)
    out = known[traced.outputs[0]]
    out.type = total.type
    goes_on.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    return ir.Graph([turn, going, total], [goes_on.outputs[0], out], nodes=nodes, name=name)


def _value(name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([]))


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    tensor = ir.Tensor(np.array(values, np.int64), name=name)
    value = ir.Value(
        name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value
