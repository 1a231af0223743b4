"""Run a program call by call and keep what some of its nodes were worth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from rewriter.program import Program
from rewriter.verify.scenarios import Scenario

__all__ = ["Recording", "record"]

TOKEN_DIM = {4: 2, 3: 1, 2: 1}
"""Dimension of the tokens by number of dimensions, where tracing did not tell: bhsd, hidden, ids."""


class _Recorder(fx.Interpreter):
    """A runner that keeps copies of some nodes' values."""

    def __init__(self, program: Program, names: frozenset[str]) -> None:
        super().__init__(program.module)
        self.names = names
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *inputs: Any) -> Any:
        self.calls.append({})
        with torch.no_grad():
            return self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.calls[-1][n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


class Recording:
    """One scenario: the program's outputs, and chosen nodes' values over the whole sequence."""

    def __init__(
        self, program: Program, outputs: tuple[Tensor, ...], calls: list[dict[str, Any]]
    ) -> None:
        self.outputs = outputs
        self._calls = calls
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._seq = _sequence_symbol(program)

    def has(self, name: str) -> bool:
        """Whether the program has a node of this name."""
        return name in self._nodes

    def value(self, name: str) -> Tensor | None:
        """What was new in each call, joined along the tokens; None for what is not a tensor."""
        values = [call[name] for call in self._calls]
        if not isinstance(values[-1], Tensor):
            return None
        node = self._nodes[name]
        if len(values) == 1 or _is_kept(node) or _is_constant(node):
            return values[-1]
        dim = self._token_dim(node, values[-1])
        return values[-1] if dim is None else torch.cat(values, dim=dim)

    def _token_dim(self, node: fx.Node, value: Tensor) -> int | None:
        """The dimension whose traced extent depends on the length of the sequence."""
        traced = node.meta.get("val")
        if self._seq is None or not isinstance(traced, Tensor):
            return TOKEN_DIM.get(value.dim())
        for dim, extent in enumerate(traced.shape):
            if isinstance(extent, torch.SymInt) and self._seq in extent.node.expr.free_symbols:
                return dim
        return None


def record(program: Program, names: frozenset[str], scenario: Scenario) -> Recording:
    """Run a scenario on a program, recording the nodes of these names that it has."""
    recorder = _Recorder(program, names)
    with torch.no_grad():
        outputs = scenario.candidate(program, recorder)
    return Recording(program, outputs, recorder.calls)


def _sequence_symbol(program: Program) -> Any:
    """What tracing called the number of tokens; None where it is fixed or there are none."""
    node = program.placeholder("input_ids")
    traced = None if node is None else node.meta.get("val")
    extent = traced.shape[-1] if isinstance(traced, Tensor) else None
    if not isinstance(extent, torch.SymInt):
        return None
    symbols = extent.node.expr.free_symbols
    return next(iter(symbols)) if len(symbols) == 1 else None


def _is_kept(node: fx.Node) -> bool:
    """Whether it shows all entries kept, not only the new ones."""
    view = node.target is torch.ops.aten.slice.Tensor and node.args[0].op == "placeholder"  # pyright: ignore
    return view or node.name == "k_positions"


def _is_constant(node: fx.Node) -> bool:
    """Whether it is computed from weights alone."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            return False
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return True
