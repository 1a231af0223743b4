"""A program's graph as JSON and back. Targets are looked up by checked names; nothing is evaluated.

FX turns a graph into Python text and runs it, so everything that ends up in that text is checked on
reading: inputs, keywords and attribute paths are plain names, operators come from known tables.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from rewriter.dialect import OPS
from rewriter.errors import ArtifactError
from rewriter.source import module_path, source_line

__all__ = ["graph_from_json", "graph_to_json", "value_from_json", "value_to_json"]

NAMESPACES = ("aten", "rewriter", "prims")
FORBIDDEN = frozenset({"from_file"})
"""Operators that reach beyond the tensors they are given."""
ATTRIBUTE = re.compile(r"[\w \-:/]+(\.[\w \-:/]+)*")
ARITHMETIC = "add sub mul floordiv truediv mod neg pow eq ne lt le gt ge and_ or_ not_ getitem"
PLAIN: dict[str, Any] = {
    f"{module.__name__.strip('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, tuple(ARITHMETIC.split())),
        (math, ("ceil", "floor", "trunc", "sqrt")),
        (torch, ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite")),
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
        "args": [value_to_json(a) for a in node.args],
        "kwargs": {k: value_to_json(v) for k, v in node.kwargs.items()},
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


def value_to_json(value: Any) -> Any:
    """JSON of an argument; nodes by name. Raises ArtifactError for other types."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [value_to_json(item) for item in value]}
    if isinstance(value, list):
        return [value_to_json(item) for item in value]
    if isinstance(value, slice):
        return {"slice": [value_to_json(v) for v in (value.start, value.stop, value.step)]}
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
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            name = item.get("name", "?") if isinstance(item, dict) else "?"
            raise ArtifactError(f"node {name!r} of the graph is damaged: {error!r}") from error
        nodes[item["name"]] = node
    return graph


def _node_from_json(graph: fx.Graph, item: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    op, name = item["op"], item["name"]
    args = tuple(value_from_json(a, nodes) for a in item["args"])
    kwargs = {k: value_from_json(v, nodes) for k, v in item["kwargs"].items()}
    if not all(key.isidentifier() for key in kwargs):
        raise ArtifactError(f"node {name!r} has the keywords {sorted(kwargs)}")
    if op == "output":
        return graph.output(args[0])
    node = graph.create_node(op, _checked_target(op, item["target"], name), args, kwargs, name=name)
    if node.name != name:
        raise ArtifactError(f"node {name!r} is stored twice")
    if op == "call_function":
        node.meta["stack_trace"] = _frame(item.get("source", ""))
        node.meta["nn_module_stack"] = {"": (item.get("module", ""), "")}
    if "rewrite" in item:
        node.meta["rewrite"] = tuple(item["rewrite"])
    return node


def _checked_target(op: str, target: str, name: str) -> Any:
    """What a node stands for: an input of its name, an attribute path, or an operator."""
    if op == "call_function":
        return _target_from_json(target)
    if op == "placeholder" and target == name and name.isidentifier():
        return target
    if op == "get_attr" and ATTRIBUTE.fullmatch(target):
        return target
    raise ArtifactError(f"node {name!r} has the operation {op!r} on {target!r}")


def _frame(source: str) -> str:
    """A stack trace of one frame that reads back as this source line."""
    where, separator, function = source.partition(" in ")
    file, _, line = where.rpartition(":")
    readable = separator and source.isprintable()
    return f'File "{file}", line {line}, in {function}' if readable else ""


def _target_from_json(text: str) -> Any:
    if text in PLAIN:
        return PLAIN[text]
    namespace, _, rest = text.partition(".")
    name, _, overload = rest.rpartition(".")
    if namespace == "rewriter" and name in OPS:
        return OPS[name].overload
    known = namespace in ("aten", "prims") and name not in FORBIDDEN
    if not known or not name.isidentifier() or not overload.isidentifier():
        raise ArtifactError(f"unknown operator {text!r}")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ArtifactError(f"unknown operator {text!r}")
    return found


def value_from_json(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The inverse. Raises ArtifactError for an unknown kind."""
    if isinstance(value, list):
        return [value_from_json(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ArtifactError(f"unknown value {str(value)[:80]}")
    ((kind, inner),) = value.items()
    if kind == "node":
        return nodes[inner]
    if kind == "tuple":
        return tuple(value_from_json(item, nodes) for item in inner)
    if kind == "slice":
        return slice(*(value_from_json(item, nodes) for item in inner))
    if kind == "float":
        return float(inner)
    if kind == "device":
        return torch.device(inner)
    found = getattr(torch, inner, None)
    if kind in TORCH_VALUES and isinstance(found, TORCH_VALUES[kind]):
        return found
    raise ArtifactError(f"unknown value {kind!r}: {inner!r}")
