"""The quality that the user asks of approximate passes, and which of them to give up for it."""

from __future__ import annotations

from rewriter.engine.pipeline import Applied
from rewriter.engine.rewrite_pass import Fidelity
from rewriter.verify.bench import Bench, Identity
from rewriter.verify.bisection import first_failing
from rewriter.verify.trial import Trial
from rewriter.verify.verification import Verification

__all__ = ["over_limits"]


def over_limits(trial: Trial, bench: Bench, limits: Verification) -> dict[Identity, str]:
    """Approximate rewrites that have to go, and why; the first ones stay as far as limits allow."""
    approximate = [a for a in trial.applied if a.rewrite.fidelity is Fidelity.APPROXIMATE]
    far = _far_sites(trial, approximate, limits)
    if far or not approximate:
        return far
    problem = exceeded(bench.baseline.metrics(trial.asked.outputs), limits)
    if not problem:
        return {}

    def fails(length: int) -> bool:
        left_out = frozenset(a.identity for a in approximate[length:])
        program = bench.build(bench.asked, trial.excluded | left_out).program
        return bool(exceeded(bench.baseline.metrics(bench.baseline.outputs(program)), limits))

    kept = first_failing(len(approximate), fails) - 1
    return {a.identity: problem for a in approximate[kept:]}


def _far_sites(
    trial: Trial, approximate: list[Applied], limits: Verification
) -> dict[Identity, str]:
    most = limits.max_relative_l2
    if most is None:
        return {}
    errors = {a.identity: trial.methods[a.identity].get("relative_l2", 0.0) for a in approximate}
    return {
        identity: f"relative_l2={error:.3g} exceeds max_relative_l2={most}"
        for identity, error in errors.items()
        if error > most
    }


def exceeded(metrics: dict[str, float], limits: Verification) -> str:
    """Which limit metrics break; "" if none."""
    kl, top1 = metrics.get("kl_mean"), metrics.get("top1_agreement")
    if limits.max_kl is not None and kl is not None and kl > limits.max_kl:
        return f"kl_mean={kl:.3g} exceeds max_kl={limits.max_kl}"
    if limits.min_top1 is not None and top1 is not None and top1 < limits.min_top1:
        return f"top1_agreement={top1:.3g} is below min_top1={limits.min_top1}"
    return ""
