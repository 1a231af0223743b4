"""From an exported program to a plain graph: tensors in, a tuple of tensors out, nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

from rewriter.capture.functional import functionalize

__all__ = ["flat_graph"]

_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


def flat_graph(exported: ExportedProgram, names: Sequence[str | None]) -> fx.GraphModule:
    """The graph of `exported` over the model's own weights, without checks and wrappers.

    Args:
        names: of the inputs in order; None for a constant, whose placeholder is dropped.
    """
    source, exported = _functional(exported)
    graph = source.graph
    _drop_checks(graph)
    _name_inputs(graph, names)
    graph.eliminate_dead_code()
    graph.lint()
    module = fx.GraphModule(source, graph, class_name="Captured")
    _own_mutated_buffers(module, exported)
    return module


def _functional(exported: ExportedProgram) -> tuple[fx.GraphModule, ExportedProgram]:
    """The graph as functional ATen, and the program that it comes from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = exported.module(check_guards=False)
        source.graph.set_codegen(fx.CodeGen())
        if functionalize(source.graph):
            return source, exported
        exported = exported.run_decompositions({})
        source = exported.module(check_guards=False)
        source.graph.set_codegen(fx.CodeGen())
        return source, exported


def _drop_checks(graph: fx.Graph) -> None:
    """Remove run-time assertions; what they compare dies with them."""
    for node in list(graph.nodes):
        is_check = node.op == "call_function" and any(name in str(node.target) for name in _CHECKS)
        if is_check and not node.users:
            graph.erase_node(node)


def _name_inputs(graph: fx.Graph, names: Sequence[str | None]) -> None:
    for node, name in zip(list(graph.find_nodes(op="placeholder")), names, strict=True):
        if name is None:
            graph.erase_node(node)
            continue
        node.target = name
        if node.name != name:
            node._rename(name)


def _own_mutated_buffers(module: fx.GraphModule, exported: ExportedProgram) -> None:
    """Give the graph its own copy of buffers that it writes: the model's stay as they are."""
    for path in exported.graph_signature.buffers_to_mutate.values():
        parent, _, name = path.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, name, torch.clone(getattr(owner, name)))
