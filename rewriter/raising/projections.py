"""Say where an attention's q, k and v come from: one fused projection, separate ones, or none.

Nothing is replaced: a fused projection with slices is already the cheapest form. Passes and the
report read the annotation.
"""

from __future__ import annotations

import torch
from torch import fx

from rewriter.engine.miss import Miss
from rewriter.engine.site import bound_arguments
from rewriter.program import Program
from rewriter.raising.linear import as_linear
from rewriter.report.report import Coverage

__all__ = ["coverage_of_projections", "projection_kind", "raise_projections"]

aten = torch.ops.aten

_LARGEST = 200


def raise_projections(program: Program) -> list[Miss]:
    """Set `meta["projection"]` of attentions: `fused_qkv`, `fused_kv`, `separate` or `other`."""
    for node in program.calls(torch.ops.rewriter.attention.default):
        node.meta["projection"] = projection_kind(node)
    return []


def coverage_of_projections(program: Program) -> Coverage:
    """How many attentions have projections that were understood, and of what kinds."""
    calls = program.calls(torch.ops.rewriter.attention.default)
    kinds = [node.meta.get("projection", "other") for node in calls]
    known = [kind for kind in kinds if kind != "other"]
    return Coverage("projection", len(known), len(kinds), tuple(dict.fromkeys(known)))


def projection_kind(node: fx.Node) -> str:
    """How q, k and v of an attention are projected."""
    arguments = bound_arguments(node)
    q, k, v = (_linears(arguments[name]) for name in ("q", "k", "v"))
    if not (q and k and v):
        return "other"
    if k & v:
        return "fused_qkv" if q & k else "fused_kv"
    return "separate"


def _linears(output: fx.Node) -> set[fx.Node]:
    """The nearest projections that a value comes from; none if something else mixes on the way."""
    found: set[fx.Node] = set()
    seen, stack = {output}, [output]
    while stack and len(seen) < _LARGEST:
        node = stack.pop()
        if as_linear(node) is not None:
            found.add(node)
            continue
        if node.op == "placeholder" or node.target is torch.ops.rewriter.attention.default:
            continue
        operands = [n for n in _values(node) if n not in seen]
        seen.update(operands)
        stack.extend(operands)
    return found


def _values(node: fx.Node) -> list[fx.Node]:
    """Operands that carry activations: for a rotation its first, sizes never."""
    if node.target is torch.ops.rewriter.rope.default:
        return [bound_arguments(node)["x"]]
    if node.target is aten.sym_size.int:
        return []
    return node.all_input_nodes
