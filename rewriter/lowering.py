"""Lower a program to what a backend runs.

`eager` runs the graph as it is: every dialect operator calls its reference. `inductor` first inlines the
references of operators that do not mutate state, so that torch.compile fuses across them; the ones that
do stay calls, which keeps their updates in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewriter.dialect import OPS
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
        return program.module
    return torch.compile(inline_references(program).module, dynamic=True)


def inline_references(program: Program) -> Program:
    """A copy whose pure dialect calls are calls of their plain Python references."""
    lowered = program.clone()
    references = {
        op.overload: op.reference for op in OPS.values() if not op.overload._schema.is_mutable
    }
    for node in lowered.graph.nodes:
        if node.op == "call_function" and node.target in references:
            inline(node, references[node.target])
    lowered.module.recompile()
    return lowered


def inline(node: fx.Node, reference: Callable[..., Any]) -> None:
    """Point one call at a plain function with the same arguments."""
    node.target = reference
