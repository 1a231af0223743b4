"""What all attempts to verify share: the original's answers, the program before any pass, the passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.engine.pipeline import PipelineResult, Setting, apply_passes
from rewriter.engine.rewrite_pass import RewritePass
from rewriter.engine.shapes import Shapes
from rewriter.errors import VerificationError
from rewriter.program import Program
from rewriter.verify.baseline import Baseline, difference
from rewriter.verify.compare import CANNOT_RUN
from rewriter.verify.narrow import narrowed

__all__ = ["Bench", "Identity", "Plan"]

Identity = tuple[str, str]
"""A pass as text and the key of a site."""


@dataclass(frozen=True)
class Plan:
    """One way to build and judge the rewrites.

    Attributes:
        name: for people; "" for the program that ships.
        base: what is rewritten. baseline: what it should return.
        setting: the knobs; None = those asked for.
        exact: whether the outputs have to be the baseline's, or only finite and of the same form.
    """

    name: str
    base: Program
    baseline: Baseline
    setting: Setting | None
    exact: bool

    def wrong(self, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
        """What is wrong with a scenario's outputs; "" if nothing."""
        problem = difference(outputs, expected) if self.exact else _unlike(outputs, expected)
        return f"{problem} {self.name}".rstrip() if problem else ""


class Bench:
    """Builds the programs that are tried.

    Args:
        baseline: of the original. base: a program known to equal it.
        length: tokens of the longest sequence tried.
    """

    def __init__(
        self, baseline: Baseline, base: Program, passes: Sequence[RewritePass], length: int
    ) -> None:
        self.baseline, self.base, self.passes, self.length = baseline, base, passes, length
        self.shapes = Shapes.of(base)
        self.asked = Plan("", base, baseline, None, exact=False)
        exact, stressed = "at the exact setting", "at a small setting"
        self.exact = Plan(exact, base, baseline, self.exact_setting, exact=True)
        self.stressed = Plan(stressed, base, baseline, self.stress_setting, exact=False)
        self.narrow = self._narrow_plan()

    def _narrow_plan(self) -> Plan | None:
        narrow = narrowed(self.base, self.length)
        if narrow is None:
            return None
        own = Baseline.of_outputs(narrow, self.baseline.scenarios)
        return Plan("with its windows made short", narrow, own, self.exact_setting, exact=True)

    def exact_setting(self, rewrite: RewritePass, facts: Any) -> RewritePass:
        """The knobs at which a pass equals the original."""
        return rewrite.exact_setting(facts, length=self.length)

    def stress_setting(self, rewrite: RewritePass, facts: Any) -> RewritePass:
        """Knobs at which its approximation is at work."""
        return rewrite.stress_setting(facts, length=self.length)

    def build(
        self, plan: Plan, excluded: frozenset[Identity], *, keep_code: bool = False
    ) -> PipelineResult:
        """The plan's base with everything applied that is not excluded."""
        return apply_passes(
            plan.base,
            self.passes,
            excluded=excluded,
            setting=plan.setting,
            keep_code=keep_code,
            shapes=self.shapes,
        )

    def problem(self, plan: Plan, excluded: frozenset[Identity]) -> str:
        """What is wrong with the whole program of a plan; "" if nothing."""
        program = self.build(plan, excluded).program
        pairs = zip(plan.baseline.scenarios, plan.baseline.references, strict=True)
        for scenario, expected in pairs:
            try:
                with torch.no_grad():
                    wrong = plan.wrong(scenario.candidate(program), expected)
            except CANNOT_RUN as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                return f"{scenario.name}: {wrong}"
        return ""

    def must_hold(self) -> None:
        """Raises VerificationError when even the program before any pass is not the original."""
        problem = self.baseline.mismatch(self.base)
        if problem:
            raise VerificationError(
                f"before any pass the program differs from the model: {problem}"
            )


def _unlike(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """What no approximation may do; "" if nothing."""
    for output, reference in zip(outputs, expected, strict=True):
        if output.dtype != reference.dtype or output.shape != reference.shape:
            return f"{output.dtype} {list(output.shape)} instead of {list(reference.shape)}"
        if bool(reference.isfinite().all()) and not bool(output.isfinite().all()):
            return "output is not finite"
    return ""
