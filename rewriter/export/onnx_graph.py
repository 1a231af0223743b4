"""The last edits of an ONNX graph: names, weights as products read them, data in a file of their own."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.export.ports import Port

__all__ = ["count_operators", "name_ports", "store_data", "store_transposed", "strip"]

ALIGNMENT = 4096
"""Offsets in the data file are multiples of a page, so that they can be mapped."""
INLINE_BYTES = 1024
"""Initializers below this stay in the graph."""


def strip(model: ir.Model) -> None:
    """Drop what tracing left: source paths, and shapes of values, which a runtime infers itself."""
    model.metadata_props.clear()
    model.doc_string = None
    model.producer_name, model.producer_version = "rewriter", None
    kept = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    model.graph.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in kept:
                value.shape = value.type = None


def name_ports(model: ir.Model, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Names and dimensions as the program's ports have them."""
    for values, ports in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, port in zip(values, ports, strict=True):
            value.name, value.shape = port.name, ir.Shape(port.dims)
            value.metadata_props.clear()


def store_transposed(model: ir.Model) -> None:
    """Weights that are read transposed are stored so; look-ups in them (tied embeddings) turn round.

    A product with a weight that lies as it is read needs no copy of it, and takes the runtime's best way.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        users = [use.node for use in value.uses()]
        turning = [node for node in users if _transposes(node)]
        lookups = [node for node in users if _looks_up(node, value)]
        if value.is_graph_input() or not turning or len(turning) + len(lookups) < len(users):
            continue
        tensor = value.const_value
        assert tensor is not None
        value.const_value = _transposed(tensor)
        value.shape = ir.Shape(value.const_value.shape)
        for node in turning:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)
        for node in lookups:
            _look_up_columns(graph, node)


def _looks_up(node: ir.Node, table: ir.Value) -> bool:
    """Whether it gathers rows of the table, by indices of known rank."""
    axis = node.attributes.get("axis")
    return (
        node.op_type == "Gather"
        and node.inputs[0] is table
        and (axis is None or axis.as_int() == 0)
        and node.inputs[1] is not None
        and node.inputs[1].shape is not None
        and not any(value.is_graph_output() for value in node.outputs)
    )


def _look_up_columns(graph: ir.Graph, node: ir.Node) -> None:
    """Gather columns of the table, which now lies the other way round, as rows."""
    table, indices = node.inputs
    assert indices is not None and indices.shape is not None
    out, rank = node.outputs[0], len(indices.shape)
    columns = ir.node("Gather", [table, indices], {"axis": 1}, name=f"{node.name}_columns")
    perm = [*range(1, rank + 1), 0]
    rows = ir.node("Transpose", columns.outputs, {"perm": perm}, name=f"{node.name}_rows")
    rows.outputs[0].shape, rows.outputs[0].type = out.shape, out.type
    columns.outputs[0].type = out.type
    rows.outputs[0].name = f"{out.name}_rows"
    graph.insert_before(node, (columns, rows))
    ir.convenience.replace_all_uses_with(out, rows.outputs[0])
    graph.remove(node, safe=True)


def _transposes(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    graph_output = any(value.is_graph_output() for value in node.outputs)
    return (
        node.op_type == "Transpose"
        and not graph_output
        and perm is not None
        and list(perm.as_ints()) == [1, 0]
    )


def _transposed(tensor: Any) -> ir.LazyTensor:
    """Made when it is written, so that no two copies of all weights are in memory."""
    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape(list(tensor.shape)[::-1]),
        name=tensor.name,
    )


def count_operators(model: ir.Model) -> dict[str, int]:
    """How often each operator stands in the graph; those of other domains as `domain::name`."""
    names = (f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.all_nodes())
    return dict(sorted(Counter(names).items()))


def store_data(model: ir.Model, path: Path) -> dict[str, Any] | None:
    """Write initializers of `INLINE_BYTES` and more to `path`; the graph then refers to it.

    Returns:
        name, size and SHA-256 of the file; None where nothing is large enough.
    """
    digest, offset = hashlib.sha256(), 0
    with path.open("wb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < INLINE_BYTES:
                continue
            padding = b"\0" * (-offset % ALIGNMENT)
            content = tensor.tobytes()
            for part in (padding, content):
                file.write(part)
                digest.update(part)
            offset += len(padding)
            value.const_value = ir.ExternalTensor(
                path.name,
                offset,
                len(content),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=path.parent,
            )
            offset += len(content)
    if offset == 0:
        path.unlink()
        return None
    return {"file": path.name, "bytes": offset, "sha256": digest.hexdigest()}
