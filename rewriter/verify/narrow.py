"""Windows and chunks longer than what is tried, made short, so that their edges are seen."""

from __future__ import annotations

from torch import fx

from rewriter.dialect import OPS
from rewriter.program import Program

__all__ = ["narrowed"]

SPANS = ("sliding_window", "chunked", "local")
"""Masks whose edge lies `span` entries away; a prefix starts at the first token."""
NARROW_SPAN = 5


def narrowed(program: Program, length: int) -> Program | None:
    """A copy whose spans above `length` are short; None when there are none.

    It computes another function than the model: rewrites of it are compared with it alone.
    """
    if not any(_is_wide(node, length) for node in program.calls(OPS["attention"].overload)):
        return None
    narrow = program.clone()
    for node in narrow.calls(OPS["attention"].overload):
        if _is_wide(node, length):
            node.kwargs = {**node.kwargs, "span": NARROW_SPAN}
    narrow.module.recompile()
    return narrow


def _is_wide(node: fx.Node, length: int) -> bool:
    span = node.kwargs.get("span", 0)
    return node.kwargs.get("mask") in SPANS and isinstance(span, int) and span >= length
