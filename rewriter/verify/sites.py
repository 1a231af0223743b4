"""Check each rewritten site against its reference, on what it saw while the program ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.engine.pipeline import Applied, PipelineResult
from rewriter.program import Program
from rewriter.verify.compare import relative_error, relative_l2
from rewriter.verify.scenarios import Scenario
from rewriter.verify.tolerances import tolerance

__all__ = ["SiteVerdict", "check_sites", "method_errors"]


POSITIONS = ("q_positions", "k_positions")
"""Inputs that a decoding program may do without."""


@dataclass(frozen=True)
class SiteVerdict:
    """The worst a site did over the scenarios."""

    error: float
    tolerance: float
    reason: str

    @property
    def passed(self) -> bool:
        """Whether it may stay."""
        return not self.reason


class _Recorder(fx.Interpreter):
    """Runs a program and keeps copies of some nodes' values, call by call."""

    def __init__(self, program: Program, names: set[str]) -> None:
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

    def merged(self, node: fx.Node) -> Tensor | None:
        """A node's value over the whole sequence: what was new in each call, joined."""
        values = [call[node.name] for call in self.calls]
        if not isinstance(values[-1], Tensor):
            return None
        if len(values) == 1 or _is_kept(node):
            return values[-1]
        dim = {4: 2, 3: 1, 2: 1}.get(values[-1].dim())
        return values[-1] if dim is None or _constant(node) else torch.cat(values, dim=dim)


def _is_kept(node: fx.Node) -> bool:
    """Whether it shows all entries kept, not only the new ones."""
    view = node.target is torch.ops.aten.slice.Tensor and node.args[0].op == "placeholder"  # pyright: ignore
    return view or node.name == "k_positions"


def _constant(node: fx.Node) -> bool:
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


def _nodes(program: Program) -> dict[str, fx.Node]:
    return {node.name: node for node in program.graph.nodes}


def _recorded(program: Program, names: set[str], scenario: Scenario) -> _Recorder:
    recorder = _Recorder(program, names)
    with torch.no_grad():
        scenario.candidate(program, recorder)
    return recorder


class _Inputs:
    """Looks up a reference's inputs: in the rewritten program, else in the one before any rewrite.

    What a rewrite made dead, such as rotary tables at true positions, is computed from positions alone
    and the same in both.
    """

    def __init__(self, base: Program, result: PipelineResult, scenario: Scenario) -> None:
        self.nodes, self.base_nodes = _nodes(result.program), _nodes(base)
        named = {n for a in result.applied for n in (*a.inputs, a.after) if n is not None}
        self.recorder = _recorded(result.program, named & self.nodes.keys(), scenario)
        lost = (named & self.base_nodes.keys()) - self.nodes.keys()
        self.base = _recorded(base, lost, scenario) if lost else None

    def __call__(self, name: str | None) -> Tensor | None:
        if name in POSITIONS and name not in self.nodes:
            name = "q_positions" if "q_positions" in self.nodes else None
        if name is None:
            return None
        if name in self.nodes:
            return self.recorder.merged(self.nodes[name])
        assert self.base is not None
        return self.base.merged(self.base_nodes[name])

    def complete(self, applied: Applied) -> bool:
        """Whether the rewrite's output and all its reference needs were seen."""
        known = self.nodes.keys() | self.base_nodes.keys() | {None, *POSITIONS}
        return applied.after in self.nodes and set(applied.inputs) <= known


def check_sites(
    result: PipelineResult, base: Program, scenarios: Sequence[Scenario]
) -> dict[int, SiteVerdict]:
    """Each applied rewrite's output against its reference, by its index in `result.applied`."""
    verdicts: dict[int, SiteVerdict] = {}
    for scenario in scenarios if result.applied else ():
        inputs = _Inputs(base, result, scenario)
        for i, applied in enumerate(result.applied):
            verdict = verdicts.get(i, SiteVerdict(0.0, 0.0, ""))
            if verdict.passed and inputs.complete(applied):
                verdicts[i] = _worse(verdict, _verdict(applied, inputs, scenario.name))
    return verdicts


def _verdict(applied: Applied, inputs: _Inputs, scenario: str) -> SiteVerdict:
    output = inputs(applied.after)
    tensors = [inputs(name) for name in applied.inputs]
    reference = applied.chosen.reference(*tensors, facts=applied.facts)
    if output is None:
        return SiteVerdict(float("inf"), 0.0, "the rewrite's output is not a tensor")
    allowed = tolerance(applied.rewrite.fidelity, reference.dtype)
    if output.dtype != reference.dtype:
        reason = f"dtype {output.dtype} instead of {reference.dtype}"
        return SiteVerdict(float("inf"), allowed, reason)
    error = relative_error(output, reference)
    if error <= allowed:
        return SiteVerdict(error, allowed, "")
    reason = f"differs from its reference by {error:.1e} (allowed {allowed:.0e}) in {scenario}"
    return SiteVerdict(error, allowed, reason)


def _worse(a: SiteVerdict, b: SiteVerdict) -> SiteVerdict:
    return b if b.reason or b.error >= a.error else a


def method_errors(
    base: Program, applied: Sequence[Applied], scenario: Scenario
) -> dict[int, dict[str, float]]:
    """Reference of the rewrite against the original operator, on the original program's values."""
    nodes = _nodes(base)
    known = {
        i: a
        for i, a in enumerate(applied)
        if a.before in nodes and {n for n in a.inputs if n is not None} <= nodes.keys()
    }
    wanted = {n for a in known.values() for n in (*a.inputs, a.before) if n is not None}
    recorder = _recorded(base, wanted, scenario)
    errors: dict[int, dict[str, float]] = {}
    for i, a in known.items():
        tensors = [None if n is None else recorder.merged(nodes[n]) for n in a.inputs]
        original = recorder.merged(nodes[a.before])
        if original is not None:
            reference = a.chosen.reference(*tensors, facts=a.facts)
            errors[i] = {"relative_l2": relative_l2(reference, original)}
    return errors
