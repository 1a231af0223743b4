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


def _reference(applied: Applied, recorder: _Recorder, nodes: dict[str, fx.Node]) -> Tensor:
    tensors = [None if name is None else recorder.merged(nodes[name]) for name in applied.inputs]
    return applied.chosen.reference(*tensors, facts=applied.facts)


def check_sites(result: PipelineResult, scenarios: Sequence[Scenario]) -> dict[int, SiteVerdict]:
    """Each applied rewrite's output against its reference, by its index in `result.applied`."""
    nodes = _nodes(result.program)
    checkable = {
        i: a
        for i, a in enumerate(result.applied)
        if a.after in nodes and all(n is None or n in nodes for n in a.inputs)
    }
    wanted = {n for a in checkable.values() for n in (*a.inputs, a.after) if n is not None}
    verdicts = {i: SiteVerdict(0.0, 0.0, "") for i in checkable}
    for scenario in scenarios:
        recorder = _recorded(result.program, wanted, scenario)
        for i, applied in checkable.items():
            if verdicts[i].passed:
                verdicts[i] = _worse(verdicts[i], _verdict(applied, recorder, nodes, scenario.name))
    return verdicts


def _verdict(
    applied: Applied, recorder: _Recorder, nodes: dict[str, fx.Node], scenario: str
) -> SiteVerdict:
    output = recorder.merged(nodes[applied.after])
    reference = _reference(applied, recorder, nodes)
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
        if a.before in nodes and all(n is None or n in nodes for n in a.inputs)
    }
    wanted = {n for a in known.values() for n in (*a.inputs, a.before) if n is not None}
    recorder = _recorded(base, wanted, scenario)
    errors: dict[int, dict[str, float]] = {}
    for i, a in known.items():
        original = recorder.merged(nodes[a.before])
        if original is not None:
            errors[i] = {"relative_l2": relative_l2(_reference(a, recorder, nodes), original)}
    return errors
