"""What ONNX Runtime's own operators join: q, k and v in one product, a sum with the norm behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from codegen.onnx_functions.node import MICROSOFT

__all__ = ["fuse_skip_norms", "pack_projections"]


def pack_projections(model: ir.Model) -> None:
    """Products of one x with the weights of q, k and v become one, which GroupQueryAttention takes.

    The joined weight is made when it is written.
    """
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention" and node.inputs[1] is not None:
            _pack(model.graph, node)


def _pack(graph: ir.Graph, node: ir.Node) -> None:
    parts = [_Projection.of(value, node) for value in node.inputs[:3]]
    if any(part is None for part in parts):
        return
    made: list[_Projection] = [part for part in parts if part is not None]
    if len({id(part.x) for part in made}) != 1 or len({part.bias is None for part in made}) != 1:
        return
    weight = _joined(graph, [part.weight for part in made], f"{node.name}_qkv_weight")
    product = ir.node("MatMul", [made[0].x, weight])
    last = product
    if made[0].bias is not None:
        bias = _joined(graph, [part.bias for part in made], f"{node.name}_qkv_bias")
        last = ir.node("Add", [product.outputs[0], bias])
    first = made[0].nodes[0]
    graph.insert_before(first, [product] if last is product else [product, last])
    node.replace_input_with(0, last.outputs[0])
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)
    for part in made:
        graph.remove(part.nodes[::-1], safe=True)
        for value in (part.weight, part.bias):
            if value is not None and value.name is not None:
                graph.initializers.pop(value.name)


class _Projection:
    """x · weight (+ bias) whose result one node alone reads."""

    def __init__(self, nodes: list[ir.Node], weight: ir.Value, bias: ir.Value | None) -> None:
        self.nodes, self.weight, self.bias = nodes, weight, bias
        self.x = nodes[0].inputs[0]

    @classmethod
    def of(cls, value: ir.Value | None, reader: ir.Node) -> _Projection | None:
        node = None if value is None else value.producer()
        if node is None or not _read_by(node, reader):
            return None
        bias, product = None, node
        if node.op_type == "Add":
            bias = next((v for v in node.inputs if _is_own_weight(v)), None)
            product = next((p for v in node.inputs if (p := v and v.producer())), None)
            if bias is None or product is None or not _read_by(product, node):
                return None
        if product.op_type != "MatMul" or not _is_own_weight(product.inputs[1]):
            return None
        nodes = [product] if product is node else [product, node]
        weight = product.inputs[1]
        assert weight is not None
        return cls(nodes, weight, bias)


def _read_by(node: ir.Node, reader: ir.Node) -> bool:
    readers = [use.node for use in node.outputs[0].uses()]
    return readers == [reader] and not node.outputs[0].is_graph_output()


def _is_own_weight(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.uses()) == 1


def _joined(graph: ir.Graph, values: Sequence[Any], name: str) -> ir.Value:
    """A new initializer: these side by side in the last dimension."""
    tensors = [value.const_value for value in values]

    def join() -> ir.Tensor:
        return ir.Tensor(
            np.concatenate([t.numpy() for t in tensors], axis=-1), dtype=tensors[0].dtype
        )

    shape = [*tensors[0].shape[:-1], sum(t.shape[-1] for t in tensors)]
    lazy = ir.LazyTensor(join, dtype=tensors[0].dtype, shape=ir.Shape(shape), name=name)
    joined = ir.Value(name=name, const_value=lazy, shape=lazy.shape, type=ir.TensorType(lazy.dtype))
    graph.register_initializer(joined)
    return joined


def fuse_skip_norms(model: ir.Model) -> None:
    """RMSNormalization of a sum of two values of one shape becomes SkipSimplifiedLayerNormalization."""
    for node in list(model.graph):
        if node.op_type != "RMSNormalization":
            continue
        total = node.inputs[0].producer() if node.inputs[0] is not None else None
        if total is None or total.op_type != "Add" or not _same_shapes(total):
            continue
        if any(
            use.node.op_type == node.op_type and use.node is not node
            for use in total.outputs[0].uses()
        ):
            continue
        _fuse_skip_norm(model.graph, total, node)


def _same_shapes(node: ir.Node) -> bool:
    """Before `strip`, while shapes are known."""
    shapes = [value.shape if value is not None else None for value in node.inputs]
    return None not in shapes and str(shapes[0]) == str(shapes[1]) and len(shapes[0] or ()) == 3


def _fuse_skip_norm(graph: ir.Graph, total: ir.Node, norm: ir.Node) -> None:
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*total.inputs, norm.inputs[1]],
        {"epsilon": norm.attributes["epsilon"].as_float()},
        domain=MICROSOFT,
        num_outputs=4,
    )
    for kept in (fused.outputs[0], fused.outputs[3]):
        kept.shape, kept.type = total.outputs[0].shape, total.outputs[0].type
    graph.insert_before(total, fused)
    ir.convenience.replace_all_uses_with(norm.outputs[0], fused.outputs[0])
    ir.convenience.replace_all_uses_with(total.outputs[0], fused.outputs[3])
    graph.remove([norm, total], safe=True)
