"""Put kernels in the place of a graph's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from codegen.kernel import KernelDescription, safe_name
from codegen.triton_kernels.table import KERNELS
from codegen.triton_program.attention import attention_site
from codegen.triton_program.ledger import Ledger, Site
from codegen.triton_program.norm import rms_norm_site
from codegen.triton_program.products import gated_mlp_site, linear_site, mlp_site
from codegen.triton_program.rotary import find_rotary, rotary_site
from codegen.triton_program.tail import take
from codegen.wanted_kernels import States, arguments_of, describe, states_of
from rewriter.dialect import OPS
from rewriter.engine.miss import Miss
from rewriter.program import Program

__all__ = ["place_kernels"]

_OURS = torch.ops.rewriter
_PRODUCTS: dict[Any, tuple[Callable[..., Any], tuple[str, ...]]] = {
    torch.ops.aten.linear.default: (linear_site, ("input", "weight", "bias")),
    _OURS.linear.default: (linear_site, ("x", "weight", "bias")),
    _OURS.mlp.default: (mlp_site, ("x", "up", "down", "up_bias", "down_bias")),
    _OURS.gated_mlp.default: (
        gated_mlp_site,
        ("x", "gate", "up", "down", "gate_bias", "up_bias", "down_bias"),
    ),
    _OURS.rms_norm.default: (rms_norm_site, ("x", "weight")),
}
"""What takes in the pointwise work behind it, and the arguments that it is called with."""
_TERMS = ("q", "k", "v", "q_positions", "k_positions", "bias", "sinks", "slopes")


def place_kernels(graph: fx.Graph, program: Program) -> Ledger:
    """Change a copy of the program's graph; what no kernel supports stays as it is."""
    placing = _Placing(graph, states_of(program))
    for node in list(graph.nodes):
        if node.op != "call_function" or node in placing.gone:
            continue
        reason = placing.place(node)
        if reason is not None:
            placing.ledger.left.append(Miss.at(node, "triton", reason))
    graph.lint()
    return placing.ledger


class _Placing:
    """One run of `place_kernels`."""

    def __init__(self, graph: fx.Graph, states: States) -> None:
        self.graph, self.states, self.ledger = graph, states, Ledger()
        self.gone: set[fx.Node] = set()

    def place(self, node: fx.Node) -> str | None:
        """Why a node stays; None where it went, or is no operator of the dialect."""
        wanted = describe(node, self.states)
        if isinstance(wanted, str):
            return wanted
        if not wanted:
            return None
        reason = next(filter(None, map(_unsupported, wanted)), None)
        if reason is not None:
            return reason
        refusal = self._replace(node, wanted)
        if refusal is None:
            self.ledger.planned[node.name] = tuple(dict.fromkeys(d.operator for d in wanted))
        return refusal

    def _replace(self, node: fx.Node, wanted: tuple[KernelDescription, ...]) -> str | None:
        site, given = Site(node.name, self.ledger), arguments_of(node)
        if node.target == _OURS.kv_append.default:
            return self._replace_append(node, site)
        if node.target in _PRODUCTS:
            build, names = _PRODUCTS[node.target]
            tail = take(node)
            call, behind = build(site, given, tail), tail.nodes
            inputs = (*(given[name] for name in names), *tail.operands)
        else:
            call, behind = attention_site(site, given, wanted[0], _reference(node)), ()
            inputs = tuple(given[name] for name in _TERMS)
        self._swap(site, (node, *behind), call, inputs)
        return None

    def _replace_append(self, node: fx.Node, site: Site) -> str | None:
        found = find_rotary(node)
        if isinstance(found, str):
            return found
        call = rotary_site(site, bool(found.keys.kwargs["interleaved"]))
        with self.graph.inserting_after(found.last):
            new = self._call(site, call, found.inputs, found.queries.meta)
        found.queries.replace_all_uses_with(new)
        self._erase(found.append, found.keys, found.queries)
        return None

    def _swap(
        self,
        site: Site,
        nodes: tuple[fx.Node, ...],
        call: Callable[..., Any],
        inputs: tuple[Any, ...],
    ) -> None:
        """Let a call stand for the last of some nodes, of which it is all that anybody reads."""
        with self.graph.inserting_after(nodes[-1]):
            new = self._call(site, call, inputs, nodes[-1].meta)
        nodes[-1].replace_all_uses_with(new)
        self._erase(*reversed(nodes))

    def _call(
        self, site: Site, call: Callable[..., Any], inputs: tuple[Any, ...], meta: dict[str, Any]
    ) -> fx.Node:
        call.__name__ = safe_name(f"kernel_{site.name}")
        new = self.graph.call_function(call, inputs)
        new.meta = dict(meta)
        return new

    def _erase(self, *nodes: fx.Node) -> None:
        for node in nodes:
            self.graph.erase_node(node)
        self.gone.update(nodes)


def _unsupported(description: KernelDescription) -> str | None:
    """What every kernel of the operator has against it."""
    told = [k.supports(description) for k in KERNELS if k.operator == description.operator]
    return None if None in told else f"{description.operator}: {told[0]}"


def _reference(node: fx.Node) -> Callable[..., Any]:
    return next(op.reference for op in OPS.values() if op.overload == node.target)
