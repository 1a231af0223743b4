"""One place in a program where a pass may apply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewriter.dialect import OPS
from rewriter.program import Program
from rewriter.source import layer_index, source_line

__all__ = ["ANCHORS", "Site", "bound_arguments", "number_sites", "sites", "tensor_arguments"]

ANCHORS = {"product": ("linear", "gated_mlp", "mlp")}
"""Anchors that are any of several operators."""


@dataclass(frozen=True)
class Site:
    """An anchor operator in a program.

    Attributes:
        program: the program being rewritten.
        op: name of the anchor's dialect operator, or "program" for a pass on the whole program.
        node: the anchor; None for the whole program.
        index: 0 for the first site of this operator, and so on: stable over rewrites of other sites.
        layer: the model's layer number, where the module path tells.
    """

    program: Program
    op: str
    node: fx.Node | None
    index: int
    layer: int | None

    @property
    def label(self) -> str:
        """For people: `layer 3 attention`, or `attention #3` when the layer is unknown."""
        if self.node is None:
            return "program"
        return (
            f"layer {self.layer} {self.op}"
            if self.layer is not None
            else f"{self.op} #{self.index}"
        )

    @property
    def key(self) -> str:
        """Identifies the site in reports and exclusions: `attention#3`."""
        return f"{self.op}#{self.index}"

    @property
    def source(self) -> str:
        """The line of the user's model it came from."""
        return source_line(self.node) if self.node is not None else ""

    @property
    def arguments(self) -> dict[str, Any]:
        """The anchor's arguments by their schema names, defaults filled in."""
        if self.node is None:
            return {}
        return bound_arguments(self.node)


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by the names of its operator's schema, defaults filled in."""
    values: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # pyright: ignore
        if position < len(node.args) and not argument.kwarg_only:
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value
    return values


def tensor_arguments(site: Site) -> tuple[fx.Node | None, ...]:
    """The anchor's tensor arguments in the order of its schema, None for one that is absent."""
    if site.node is None:
        return ()
    values, schema = site.arguments, site.node.target._schema  # pyright: ignore
    tensors = [a.name for a in schema.arguments if "Tensor" in str(a.type)]
    return tuple(values[name] for name in tensors)


def number_sites(program: Program) -> None:
    """Fix the index of every anchor, so that it does not move when others are rewritten or not."""
    for op in OPS:
        for index, node in enumerate(_calls(program, op)):
            node.meta.setdefault("site_index", index)


def _calls(program: Program, op: str) -> list[fx.Node]:
    """Calls of a dialect operator; a graph spells `linear` as ATen does."""
    aten = program.calls(torch.ops.aten.linear.default) if op == "linear" else []
    return [*aten, *program.calls(OPS[op].overload)]


def sites(program: Program, op: str) -> list[Site]:
    """Every place where the dialect operator `op`, or one that it stands for, is; each in graph order."""
    if op == "program":
        return [Site(program, op, None, 0, None)]
    if op in ANCHORS:
        return [site for one in ANCHORS[op] for site in sites(program, one)]
    found: dict[int, Site] = {}
    calls = _calls(program, op)
    for node in calls:
        index = node.meta.get("site_index", 0)
        while index in found:  # two nodes made of one
            index += len(calls)
        found[index] = Site(program, op, node, index, layer_index(node))
    return list(found.values())
