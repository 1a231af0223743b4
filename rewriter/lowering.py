"""Lower a program to what a backend runs.

`eager` runs the graph's own code with the references called directly and the weights bound: neither a
dispatcher nor an attribute is asked on the way. `inductor` inlines the references of operators that
torch.compile can trace, so that it fuses across them; those that update state or count experts stay
calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from rewriter.dialect import OPS
from rewriter.dialect.linear import linear
from rewriter.dialect.registry import DialectOp
from rewriter.errors import ConfigError
from rewriter.program import Program

__all__ = ["BACKENDS", "BackendChoice", "choose_backend", "lower"]

BACKENDS = ("auto", "eager", "inductor", "cpu", "triton")
"""Every backend name; `cpu` and `triton` have no kernels yet and say so."""


@dataclass(frozen=True)
class BackendChoice:
    """The backend that will run, and why."""

    name: str
    reason: str


def choose_backend(requested: str) -> BackendChoice:
    """One rule: what was asked for, or raise; `auto` takes eager, which needs no compilation.

    Raises:
        ConfigError: an unknown backend, or one without kernels.
    """
    if requested not in BACKENDS:
        raise ConfigError("backend", requested, f"one of {', '.join(BACKENDS)}")
    if requested in ("cpu", "triton"):
        raise ConfigError(
            "backend", requested, "no kernels of this kind yet; use auto, eager or inductor"
        )
    if requested == "auto":
        return BackendChoice(
            "eager", "auto: runs at once; inductor has to be asked for, it compiles first"
        )
    return BackendChoice(requested, "asked for")


def lower(program: Program, backend: str) -> Callable[..., Any]:
    """A callable with the placeholders of the program as positional arguments.

    Args:
        program: a finished program; it is not changed.
        backend: "eager" or "inductor", from `choose_backend`.
    """
    if backend == "eager":
        return _bound(_inlined(program, OPS.values()), program.module)
    traceable = [op for op in OPS.values() if op.traceable and not op.overload._schema.is_mutable]
    graph = _inlined(program, traceable)
    return torch.compile(fx.GraphModule(program.module, graph), dynamic=True)


def _inlined(program: Program, ops: Iterable[DialectOp]) -> fx.Graph:
    """A copy that calls the plain Python references of these operators, and `linear`."""
    graph = copy.deepcopy(program.graph)
    references: dict[Any, Callable[..., Any]] = {op.overload: op.reference for op in ops}
    references[torch.ops.aten.linear.default] = linear
    for node in graph.nodes:
        if node.op == "call_function" and node.target in references:
            node.target = references[node.target]
    return graph


def _bound(graph: fx.Graph, owner: nn.Module) -> Callable[..., Any]:
    """The code of a graph with its weights as leading arguments, given once."""
    weights, inputs = list[Any](), dict[str, fx.Node]()
    first = graph.find_nodes(op="placeholder")[0]
    for node in graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if path not in inputs:
            with graph.inserting_before(first):
                inputs[path] = graph.placeholder(path.replace(".", "_"))
            inputs[path].target = inputs[path].name  # a legal name that nothing else has
            weights.append(attrgetter(path)(owner))
        node.replace_all_uses_with(inputs[path])
        graph.erase_node(node)
    return partial(fx.GraphModule(nn.Module(), graph).forward, *weights)
