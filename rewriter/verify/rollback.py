"""Apply passes, check what came out, and undo what does not hold.

Every rewrite is compared at its site with the reference of what it claims to compute, and the whole
program with the original: as it is when all passes claim the same function, and at the exact setting of
the approximate ones. A rewrite that fails is left out and everything is built again, so that no state of
a failed attempt survives.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewriter.engine.pipeline import Applied, PipelineResult, apply_passes
from rewriter.engine.rewrite_pass import Fidelity, RewritePass
from rewriter.errors import RewriterError, VerificationError
from rewriter.program import Program
from rewriter.verify.certificate import Certificate
from rewriter.verify.compare import logit_metrics, relative_error, relative_l2
from rewriter.verify.scenarios import Scenario, make_scenarios
from rewriter.verify.sites import SiteVerdict, check_sites, method_errors
from rewriter.verify.tolerances import END_TO_END
from rewriter.verify.verification import Verification

__all__ = ["Verified", "Verifier"]

log = logging.getLogger("rewriter")
Identity = tuple[str, str]


@dataclass
class Verified:
    """What is left after verification."""

    result: PipelineResult
    certificates: list[Certificate] = field(default_factory=list)
    end_to_end: dict[str, float] = field(default_factory=dict)


class Verifier:
    """Compares programs with one original, on inputs made once.

    Args:
        original: the captured program, before raising.
    """

    def __init__(self, original: Program, verification: Verification) -> None:
        self.original, self.verification = original, verification
        self.scenarios: list[Scenario] = make_scenarios(original, verification)
        with torch.no_grad():
            self.references = [s.reference(original) for s in self.scenarios]

    def mismatch(self, program: Program) -> str:
        """Where a program that claims the original's function differs from it; "" if nowhere."""
        for scenario, expected in zip(self.scenarios, self.references, strict=True):
            try:
                with torch.no_grad():
                    outputs = scenario.candidate(program)
            except (RewriterError, RuntimeError, ValueError, TypeError, IndexError) as error:
                return f"{scenario.name}: {type(error).__name__}: {error}"
            for output, reference in zip(outputs, expected, strict=True):
                if output.dtype != reference.dtype:
                    return f"{scenario.name}: dtype {output.dtype} instead of {reference.dtype}"
                error, allowed = relative_error(output, reference), _allowed(reference)
                if not error <= allowed:
                    return f"{scenario.name}: output differs by {error:.1e} (allowed {allowed:.0e})"
        return ""

    def metrics(self, program: Program) -> dict[str, float]:
        """Distance of a program to the original: KL and agreement of logits, or relative L2."""
        outputs: list[Tensor] = []
        expected: list[Tensor] = []
        with torch.no_grad():
            for scenario, reference in zip(self.scenarios, self.references, strict=True):
                outputs.append(scenario.candidate(program)[0])
                expected.append(reference[0])
        if self.original.meta.get("kind") == "causal_lm":
            return logit_metrics(torch.cat(outputs), torch.cat(expected))
        pairs = zip(outputs, expected, strict=True)
        return {"relative_l2": max(relative_l2(a, b) for a, b in pairs)}

    def verify(self, base: Program, passes: Sequence[RewritePass]) -> Verified:
        """The base program with every pass applied that holds, and a certificate for each rewrite.

        Raises:
            VerificationError: the base program itself differs from the original.
        """
        problem = self.mismatch(base)
        if problem:
            raise VerificationError(f"the program before any pass differs from the model: {problem}")
        undone: dict[Identity, tuple[Applied | None, str, SiteVerdict | None]] = {}
        while True:
            excluded = frozenset(undone)
            result = apply_passes(base, passes, excluded=excluded, keep_code=True)
            verdicts = self._site_verdicts(result, base, passes, excluded)
            failed = {
                result.applied[i].identity: (result.applied[i], verdict.reason, verdict)
                for i, verdict in verdicts.items()
                if not verdict.passed
            }
            failed |= {key: (None, reason, None) for key, reason in result.failures.items()}
            failed = failed or self._culprit(base, passes, excluded, result)
            failed = failed or self._over_budget(base, result)
            if not failed:
                break
            for (spec, key), (_, reason, _) in failed.items():
                log.warning("undone: %s at %s: %s", spec, key, reason)
            undone |= failed
        errors = method_errors(base, result.applied, self.scenarios[0])
        verified = Verified(result, end_to_end=self.metrics(result.program))
        names = tuple(scenario.name for scenario in self.scenarios)
        for i, applied in enumerate(result.applied):
            verdict = verdicts.get(i)
            verified.certificates.append(_certificate(applied, names, verdict, errors.get(i, {})))
        for identity, (applied, reason, verdict) in undone.items():
            verified.certificates.append(_undone(identity, applied, names, reason, verdict, passes))
        return verified

    def _site_verdicts(
        self,
        result: PipelineResult,
        base: Program,
        passes: Sequence[RewritePass],
        excluded: frozenset[Identity],
    ) -> dict[int, SiteVerdict]:
        """Every site against its reference, and again with small budgets where a pass approximates."""
        try:
            verdicts = check_sites(result, base, self.scenarios)
        except (RewriterError, RuntimeError, ValueError, TypeError, IndexError) as error:
            log.info("a rewritten program did not run: %s", error)
            return {}
        if all(p.fidelity is not Fidelity.APPROXIMATE for p in passes):
            return verdicts
        length = self.verification.length

        def stressed(rewrite: RewritePass, facts: Any) -> RewritePass:
            return rewrite.stress_setting(facts, length=length)

        small = apply_passes(base, passes, excluded=excluded, setting=stressed)
        by_identity = {a.identity: i for i, a in enumerate(result.applied)}
        for i, verdict in check_sites(small, base, self.scenarios).items():
            at = by_identity.get(small.applied[i].identity)
            if at in verdicts and verdicts[at].passed and verdict.error >= verdicts[at].error:
                verdicts[at] = verdict
        return verdicts

    def _holds(
        self, base: Program, passes: Sequence[RewritePass], excluded: frozenset[Identity]
    ) -> str:
        """"" when the program equals the original, its approximate passes at their exact setting."""
        length = self.verification.length

        def exact(rewrite: RewritePass, facts: Any) -> RewritePass:
            return rewrite.exact_setting(facts, length=length)

        try:
            program = apply_passes(base, passes, excluded=excluded, setting=exact).program
        except RewriterError as error:
            return str(error)
        return self.mismatch(program)

    def _culprit(
        self,
        base: Program,
        passes: Sequence[RewritePass],
        excluded: frozenset[Identity],
        result: PipelineResult,
    ) -> dict[Identity, tuple[Applied | None, str, SiteVerdict | None]]:
        """The rewrite that makes the whole program differ; found by bisection over their order."""
        problem = self._holds(base, passes, excluded)
        if not problem:
            return {}
        applied = result.applied
        good, bad = 0, len(applied)
        while bad - good > 1:
            middle = (good + bad) // 2
            rest = frozenset(a.identity for a in applied[middle:])
            if self._holds(base, passes, excluded | rest):
                bad = middle
            else:
                good = middle
        if bad == 0 or not applied:
            raise VerificationError(f"the program differs from the model without any pass: {problem}")
        found = applied[bad - 1]
        others = frozenset(a.identity for a in applied if a is not found)
        alone = self._holds(base, passes, excluded | others)
        reason = problem if alone else f"only together with the rewrites before it: {problem}"
        return {found.identity: (found, reason, None)}

    def _over_budget(
        self, base: Program, result: PipelineResult
    ) -> dict[Identity, tuple[Applied | None, str, SiteVerdict | None]]:
        """The last approximate rewrite, when the program exceeds what the user allows."""
        limits = self.verification
        approximate = [
            a for a in result.applied if a.rewrite.fidelity is Fidelity.APPROXIMATE
        ]
        if not approximate or limits.max_kl is limits.min_top1 is limits.max_relative_l2 is None:
            return {}
        over = _exceeded(self.metrics(result.program), limits)
        if over:
            return {approximate[-1].identity: (approximate[-1], over, None)}
        if limits.max_relative_l2 is None:
            return {}
        errors = method_errors(base, result.applied, self.scenarios[0])
        return {
            result.applied[i].identity: (
                result.applied[i],
                f"relative_l2={e['relative_l2']:.3g} exceeds max_relative_l2={limits.max_relative_l2}",
                None,
            )
            for i, e in errors.items()
            if e["relative_l2"] > limits.max_relative_l2
        }


def _exceeded(metrics: dict[str, float], limits: Verification) -> str:
    kl, top1 = metrics.get("kl_mean"), metrics.get("top1_agreement")
    if limits.max_kl is not None and kl is not None and kl > limits.max_kl:
        return f"kl_mean={kl:.3g} exceeds max_kl={limits.max_kl}"
    if limits.min_top1 is not None and top1 is not None and top1 < limits.min_top1:
        return f"top1_agreement={top1:.3g} is below min_top1={limits.min_top1}"
    return ""


def _allowed(reference: Tensor) -> float:
    return END_TO_END.get(reference.dtype, END_TO_END[torch.float16])


def _certificate(
    applied: Applied,
    scenarios: tuple[str, ...],
    verdict: SiteVerdict | None,
    method_error: dict[str, float],
) -> Certificate:
    return Certificate(
        spec=str(applied.rewrite),
        fidelity=applied.rewrite.fidelity.value,
        site=applied.label,
        key=applied.key,
        source=applied.source,
        status="applied",
        scenarios=scenarios,
        implementation_error=None if verdict is None else verdict.error,
        tolerance=None if verdict is None else verdict.tolerance,
        method_error=method_error,
        cost_before=applied.rewrite.original_cost(applied.facts),
        cost_after=applied.rewrite.cost(applied.facts),
    )


def _undone(
    identity: Identity,
    applied: Applied | None,
    scenarios: tuple[str, ...],
    reason: str,
    verdict: SiteVerdict | None,
    passes: Sequence[RewritePass],
) -> Certificate:
    spec, key = identity
    fidelity = next(p.fidelity.value for p in passes if str(p) == spec)
    return Certificate(
        spec=spec,
        fidelity=fidelity,
        site=key if applied is None else applied.label,
        key=key,
        source="" if applied is None else applied.source,
        status="rolled_back",
        reason=reason,
        scenarios=scenarios,
        implementation_error=None if verdict is None else verdict.error,
        tolerance=None if verdict is None else verdict.tolerance,
    )
