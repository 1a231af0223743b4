"""Apply passes, check what came out, and undo what does not hold.

Every rewrite is compared at its site with the reference of what it claims to compute, its reference with
the operator it replaced, and the whole program with the original: as it is when all passes claim the
same function, at the exact setting of the approximate ones otherwise. A rewrite that fails is left out and
everything is built again, so that no state of a failed attempt survives.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rewriter.engine.pipeline import Applied, PipelineResult
from rewriter.engine.rewrite_pass import RewritePass
from rewriter.program import Program
from rewriter.verify.baseline import Baseline
from rewriter.verify.bench import Bench, Identity
from rewriter.verify.bisection import culprit
from rewriter.verify.certificate import Certificate
from rewriter.verify.certify import applied_certificate, undone_certificate
from rewriter.verify.greedy import greedy_agreement
from rewriter.verify.limits import over_limits
from rewriter.verify.scenarios import TokenScenario
from rewriter.verify.sites import SiteVerdict
from rewriter.verify.trial import Trial
from rewriter.verify.verification import Verification

__all__ = ["Verified", "verify_and_rollback"]

log = logging.getLogger("rewriter")

MOST_CULPRITS = 4
"""Rewrites of one pass found by bisection before the rest of the pass is undone with them."""


@dataclass
class Verified:
    """What is left after verification.

    Attributes:
        outputs: of the program in each scenario of the baseline; empty where nothing was run.
    """

    result: PipelineResult
    certificates: list[Certificate] = field(default_factory=list)
    end_to_end: dict[str, float] = field(default_factory=dict)
    outputs: Sequence[tuple[Tensor, ...]] = ()

    @property
    def program(self) -> Program:
        """With every rewrite that holds."""
        return self.result.program


@dataclass(frozen=True)
class _Undone:
    reason: str
    applied: Applied | None
    verdict: SiteVerdict | None


def verify_and_rollback(
    baseline: Baseline,
    base: Program,
    passes: Sequence[RewritePass],
    verification: Verification,
) -> Verified:
    """The base program with every rewrite applied that holds, and a certificate for each.

    Args:
        baseline: the original's outputs. base: a program that was found equal to it.

    Raises:
        VerificationError: the base program itself differs from the original.
    """
    bench = Bench(baseline, base, passes, verification.length)
    undone: dict[Identity, _Undone] = {}
    while True:
        trial = Trial(bench, frozenset(undone))
        failed = _topmost(trial) or _culprit(trial, bench, undone)
        failed = failed or over_limits(trial, bench, verification)
        if not failed:
            break
        known = {a.identity: a for a in trial.applied}
        for identity, reason in failed.items():
            log.warning("undone: %s at %s: %s", *identity, reason)
            undone[identity] = _Undone(reason, known.get(identity), trial.verdict(identity))
    verified = Verified(trial.asked.result, [], _metrics(trial, bench), trial.asked.outputs)
    names = baseline.names
    for applied in trial.applied:
        method = trial.methods.get(applied.identity, {})
        verdict = trial.verdict(applied.identity)
        verified.certificates.append(applied_certificate(applied, names, verdict, method))
    for identity, u in undone.items():
        certificate = undone_certificate(
            identity, u.reason, passes, applied=u.applied, scenarios=names, verdict=u.verdict
        )
        verified.certificates.append(certificate)
    return verified


def _topmost(trial: Trial) -> dict[Identity, str]:
    """Rewrites that fail at their site; of several that share one node the last, which may be to blame."""
    last = {a.after: a.identity for a in trial.applied if a.identity in trial.failed}
    shared = {a.identity for a in trial.applied if last.get(a.after, a.identity) != a.identity}
    return {key: reason for key, reason in trial.failed.items() if key not in shared}


def _culprit(trial: Trial, bench: Bench, undone: dict[Identity, _Undone]) -> dict[Identity, str]:
    """What to undo when the program as a whole is wrong; nothing when it is not."""
    if trial.broken is None:
        return {}
    found, reason = culprit(bench, trial.broken, trial.applied, trial.excluded)
    spec = str(found.rewrite)
    failed = {found.identity: reason}
    if Counter(identity[0] for identity in undone)[spec] + 1 < MOST_CULPRITS:
        return failed
    rest = f"not tried alone after {MOST_CULPRITS} others of this pass had to be undone: {reason}"
    others = (a.identity for a in trial.applied if str(a.rewrite) == spec)
    return dict.fromkeys(others, rest) | failed


def _metrics(trial: Trial, bench: Bench) -> dict[str, float]:
    """End to end: the distance of the program that ships to the original."""
    metrics = bench.baseline.metrics(trial.asked.outputs)
    batch = bench.baseline.scenarios[min(1, len(bench.baseline.scenarios) - 1)]
    program = trial.asked.result.program
    if isinstance(batch, TokenScenario) and bench.base.decoding is not None:
        metrics["greedy_agreement"] = greedy_agreement(bench.base, program, batch)
    return metrics
