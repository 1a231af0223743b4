"""One set of rewrites: built with the knobs asked for and with telling ones, run, and judged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from rewriter.engine.pipeline import Applied, PipelineResult
from rewriter.engine.rewrite_pass import RewritePass
from rewriter.verify.bench import Bench, Identity, Plan
from rewriter.verify.compare import CANNOT_RUN
from rewriter.verify.recorder import record
from rewriter.verify.sites import SiteValues, SiteVerdict, implementation, method, recorded, worse

__all__ = ["Trial"]


@dataclass
class _Run:
    """A plan as it ran.

    Attributes:
        outputs: of each scenario, as far as it got.
        verdicts: of the sites. problem: what is wrong with the whole; "" if nothing.
    """

    plan: Plan
    result: PipelineResult
    outputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    verdicts: dict[Identity, SiteVerdict] = field(default_factory=dict)
    problem: str = ""


class Trial:
    """Everything but the excluded rewrites, tried in all plans that can tell something.

    Attributes:
        applied: the rewrites in the program.
        asked: its run with the knobs asked for; what ships.
        methods: of each rewrite, the metrics of its reference against the original.
        failed: rewrites that cannot stay by what was seen of them alone, and why.
    """

    def __init__(self, bench: Bench, excluded: frozenset[Identity]) -> None:
        self.bench, self.excluded = bench, excluded
        result = bench.build(bench.asked, excluded, keep_code=True)
        self.applied: list[Applied] = result.applied
        self.asked = _run(replace(bench.asked, exact=self._is_exact()), result)
        self.runs = [self.asked]
        self.methods: dict[Identity, dict[str, float]] = {}
        self.failed: dict[Identity, str] = {}
        self._judge_methods()
        self._collect(self.asked)
        for plan in self._other_plans():
            if self.failed or self.broken:
                return
            self.runs.append(_run(plan, bench.build(plan, excluded)))
            self._collect(self.runs[-1])

    @property
    def broken(self) -> Plan | None:
        """The plan whose program as a whole is wrong."""
        return next((run.plan for run in self.runs if run.problem), None)

    @property
    def problem(self) -> str:
        """What is wrong with it; "" if nothing."""
        return next((run.problem for run in self.runs if run.problem), "")

    def verdict(self, identity: Identity) -> SiteVerdict | None:
        """The worst of a site over all runs."""
        found: SiteVerdict | None = None
        for run in self.runs:
            if identity in run.verdicts:
                found = worse(found, run.verdicts[identity])
        return found

    def _is_exact(self) -> bool:
        """Whether the knobs asked for claim the original's function on what is tried."""
        return all(a.chosen == self.bench.exact_setting(a.rewrite, a.facts) for a in self.applied)

    def _other_plans(self) -> list[Plan]:
        """Settings that differ from what ran already, and short windows where there are long ones."""
        bench, plans = self.bench, list[Plan]()
        if not self.asked.plan.exact:
            plans.append(bench.exact)
        if any(a.chosen != bench.stress_setting(a.rewrite, a.facts) for a in self.applied):
            plans.append(bench.stressed)
        return plans if bench.narrow is None else [*plans, bench.narrow]

    def _judge_methods(self) -> None:
        """Every reference against the operator it stands for, on the original's values."""
        bench, scenario = self.bench, self.bench.baseline.scenarios[0]
        wanted = {n for a in self.applied for n in (*a.inputs, a.before) if n}
        if not wanted:
            return
        base = record(bench.base, frozenset(wanted), scenario)
        for applied in self.applied:
            exact: RewritePass = bench.exact_setting(applied.rewrite, applied.facts)
            try:
                metrics, problem = method(applied, exact, base)
            except CANNOT_RUN as error:
                metrics, problem = {}, f"its reference raises {type(error).__name__}: {error}"
            self.methods[applied.identity] = metrics
            if problem:
                self.failed[applied.identity] = problem

    def _collect(self, run: _Run) -> None:
        self.failed |= run.result.failures
        self.failed |= {i: v.reason for i, v in run.verdicts.items() if not v.passed}


def _run(plan: Plan, result: PipelineResult) -> _Run:
    """Run every scenario once on what was built, recording all sites."""
    run = _Run(plan, result)
    pairs = zip(plan.baseline.scenarios, plan.baseline.references, strict=True)
    for scenario, expected in pairs:
        try:
            values = recorded(run.result.program, plan.base, run.result.applied, scenario)
        except CANNOT_RUN as error:
            run.problem = run.problem or f"{scenario.name}: {type(error).__name__}: {error}"
            return run
        _judge(run, values, scenario.name)
        run.outputs.append(values.rewritten.outputs)
        wrong = plan.wrong(values.rewritten.outputs, expected)
        if wrong and not run.problem:
            run.problem = f"{scenario.name}: {wrong}"
    return run


def _judge(run: _Run, values: SiteValues, scenario: str) -> None:
    """Hold every site against its reference in one scenario."""
    for applied in run.result.applied:
        old = run.verdicts.get(applied.identity)
        verdict = None if old and not old.passed else implementation(applied, values, scenario)
        if verdict is not None:
            run.verdicts[applied.identity] = worse(old, verdict)
