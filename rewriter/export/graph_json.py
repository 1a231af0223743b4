"""A program's graph as JSON and back. Targets are looked up by checked names; nothing is evaluated."""

from __future__ import annotations

import importlib
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rewriter.dialect import OPS
from rewriter.errors import ArtifactError
from rewriter.program import BakedDim, Decoding, InputSpec, Signature, StateSpec
from rewriter.source import module_path, source_line

__all__ = [
    "decoding_from_json",
    "decoding_to_json",
    "graph_from_json",
    "graph_to_json",
    "signature_from_json",
    "signature_to_json",
]

NAMESPACES = ("aten", "rewriter", "prims")
PLAIN: dict[str, Any] = {
    f"{module.__name__.strip('_')}.{name}": getattr(module, name)
    for module, names in (
        (
            operator,
            "add sub mul floordiv truediv mod neg getitem pow eq ne lt le gt ge and_ or_ not_".split(),
        ),
        (math, "ceil floor trunc sqrt".split()),
        (torch, "sym_int sym_float sym_max sym_min sym_not sym_ite".split()),
    )
    for name in names
}
"""Functions besides operators that a graph may call, by the name they are stored under."""
PLAIN_NAMES = {id(function): name for name, function in PLAIN.items()}
TORCH_VALUES: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """One object a node, in order. Raises ArtifactError for what cannot be stored."""
    return [_node_to_json(node) for node in graph.nodes]


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    stored = {
        "name": node.name,
        "op": node.op,
        "target": _target_to_json(node),
        "args": [_value_to_json(a) for a in node.args],
        "kwargs": {k: _value_to_json(v) for k, v in node.kwargs.items()},
    }
    if node.op == "call_function":
        stored["source"], stored["module"] = source_line(node), module_path(node)
    if "rewrite" in node.meta:
        stored["rewrite"] = list(node.meta["rewrite"])
    return stored


def _target_to_json(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr", "output"):
        return str(node.target)
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace in NAMESPACES:
            return str(node.target)
    elif node.op == "call_function" and id(node.target) in PLAIN_NAMES:
        return PLAIN_NAMES[id(node.target)]
    raise ArtifactError(f"{node.op} {node.target} at {node.name} cannot be saved")


def _value_to_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_value_to_json(item) for item in value]}
    if isinstance(value, list):
        return [_value_to_json(item) for item in value]
    if isinstance(value, slice):
        return {"slice": [_value_to_json(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in TORCH_VALUES.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise ArtifactError(f"a value of type {type(value).__name__} cannot be saved")


def graph_from_json(stored: list[dict[str, Any]]) -> fx.Graph:
    """The graph that `graph_to_json` stored. Raises ArtifactError."""
    graph, nodes = fx.Graph(), {}
    for item in stored:
        try:
            node = _node_from_json(graph, item, nodes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            name = item.get("name", "?") if isinstance(item, dict) else "?"
            raise ArtifactError(f"node {name!r} of the graph is damaged: {error}") from error
        nodes[item["name"]] = node
    return graph


def _node_from_json(graph: fx.Graph, item: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    op, name = item["op"], item["name"]
    args = tuple(_value_from_json(a, nodes) for a in item["args"])
    kwargs = {k: _value_from_json(v, nodes) for k, v in item["kwargs"].items()}
    if op == "output":
        return graph.output(args[0])
    if op not in ("placeholder", "get_attr", "call_function"):
        raise ArtifactError(f"node {name!r} has the operation {op!r}")
    target = _target_from_json(item["target"]) if op == "call_function" else item["target"]
    node = graph.create_node(op, target, args, kwargs, name=name)
    if node.name != name:
        raise ArtifactError(f"node {name!r} is stored twice")
    if op == "call_function":
        node.meta["stack_trace"] = _frame(item.get("source", ""))
        node.meta["nn_module_stack"] = {"": (item.get("module", ""), "")}
    if "rewrite" in item:
        node.meta["rewrite"] = tuple(item["rewrite"])
    return node


def _frame(source: str) -> str:
    """A stack trace of one frame that reads back as this source line."""
    where, separator, function = source.partition(" in ")
    file, _, line = where.rpartition(":")
    return f'File "{file}", line {line}, in {function}' if separator else ""


def _target_from_json(text: str) -> Any:
    if text in PLAIN:
        return PLAIN[text]
    namespace, _, rest = text.partition(".")
    name, _, overload = rest.rpartition(".")
    if namespace == "rewriter" and name in OPS:
        return OPS[name].overload
    known = namespace in NAMESPACES and name.isidentifier() and overload.isidentifier()
    if not known or namespace == "rewriter":
        raise ArtifactError(f"unknown operator {text!r}")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ArtifactError(f"unknown operator {text!r}")
    return found


def _value_from_json(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_value_from_json(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return nodes[inner]
    if kind == "tuple":
        return tuple(_value_from_json(item, nodes) for item in inner)
    if kind == "slice":
        return slice(*(_value_from_json(item, nodes) for item in inner))
    if kind == "float":
        return float(inner)
    if kind == "device":
        return torch.device(inner)
    found = getattr(torch, inner, None)
    if kind in TORCH_VALUES and isinstance(found, TORCH_VALUES[kind]):
        return found
    raise ArtifactError(f"unknown value {kind!r}: {inner!r}")


def signature_to_json(signature: Signature) -> dict[str, Any]:
    """Plain JSON types of a signature."""
    return {
        "parameters": list(signature.parameters),
        "inputs": [
            {"name": i.name, "dtype": str(i.dtype).removeprefix("torch."), "dims": list(i.dims)}
            for i in signature.inputs
        ],
        "constants": {k: _value_to_json(v) for k, v in signature.constants.items()},
        "in_spec": json.loads(pytree.treespec_dumps(signature.in_spec)),
        "leaf_names": list(signature.leaf_names),
        "out_spec": json.loads(pytree.treespec_dumps(signature.out_spec)),
    }


def signature_from_json(stored: dict[str, Any]) -> Signature:
    """The inverse. Raises ArtifactError for an unknown output type."""
    inputs = tuple(
        InputSpec(i["name"], _dtype(i["dtype"]), tuple(i["dims"])) for i in stored["inputs"]
    )
    return Signature(
        parameters=tuple(stored["parameters"]),
        inputs=inputs,
        constants={k: _value_from_json(v, {}) for k, v in stored["constants"].items()},
        in_spec=_treespec(stored["in_spec"]),
        leaf_names=tuple(stored["leaf_names"]),
        out_spec=_treespec(stored["out_spec"]),
    )


def _treespec(stored: Any) -> pytree.TreeSpec:
    """A pytree spec; output classes are looked up in transformers alone."""
    for name in _types(stored):
        if name.startswith("transformers."):
            importlib.import_module(name.rpartition(".")[0])
    try:
        return pytree.treespec_loads(json.dumps(stored))
    except (NotImplementedError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"unknown structure of inputs or outputs: {error}") from error


def _types(stored: Any) -> list[str]:
    if isinstance(stored, list):
        return [name for item in stored for name in _types(item)]
    if not isinstance(stored, dict):
        return []
    own = stored.get("type")
    inner = [name for value in stored.values() for name in _types(value)]
    return [own, *inner] if isinstance(own, str) else inner


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"unknown dtype {name!r}")
    return found


def decoding_to_json(decoding: Decoding | None) -> dict[str, Any] | None:
    """Plain JSON types of the decoding state."""
    if decoding is None:
        return None
    states = [
        {
            "name": s.name,
            "dims": list(s.dims),
            "dtype": str(s.dtype).removeprefix("torch."),
            "role": s.role,
            "fill": s.fill,
            "layer": s.layer,
        }
        for s in decoding.states
    ]
    return {
        "states": states,
        "max_positions": decoding.max_positions,
        "max_chunk": decoding.max_chunk,
        "requires_positions": decoding.requires_positions,
    }


def decoding_from_json(stored: dict[str, Any] | None) -> Decoding | None:
    """The inverse."""
    if stored is None:
        return None
    states = tuple(
        StateSpec(s["name"], tuple(s["dims"]), _dtype(s["dtype"]), s["role"], s["fill"], s["layer"])
        for s in stored["states"]
    )
    limits = (stored["max_positions"], stored["max_chunk"], stored["requires_positions"])
    return Decoding(states, *limits)


def baked_to_json(baked: tuple[BakedDim, ...]) -> list[list[Any]]:
    """Plain JSON types of baked-in dimensions."""
    return [[b.input, b.dim, b.value, b.reason] for b in baked]
