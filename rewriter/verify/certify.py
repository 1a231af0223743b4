"""Certificates from what verification saw."""

from __future__ import annotations

from collections.abc import Sequence

from rewriter.cost.cost import Cost
from rewriter.cost.work import Work, total
from rewriter.engine.pipeline import Applied, PipelineResult
from rewriter.engine.rewrite_pass import RewritePass
from rewriter.verify.bench import Identity
from rewriter.verify.certificate import Certificate
from rewriter.verify.sites import SiteVerdict

__all__ = ["applied_certificate", "undone_certificate", "unverified_certificates"]


def applied_certificate(
    applied: Applied,
    scenarios: tuple[str, ...],
    verdict: SiteVerdict | None,
    method_error: dict[str, float],
) -> Certificate:
    """Of a rewrite that held."""
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
        cost_before=_cost(applied.rewrite.original_work(applied.facts)),
        cost_after=_cost(applied.rewrite.work(applied.facts)),
        predicted=applied.prediction,
    )


def _cost(works: tuple[Work, ...]) -> Cost | None:
    return total(works) if works else None


def undone_certificate(
    identity: Identity,
    reason: str,
    passes: Sequence[RewritePass],
    *,
    applied: Applied | None = None,
    scenarios: tuple[str, ...] = (),
    verdict: SiteVerdict | None = None,
) -> Certificate:
    """Of a rewrite that is not in the program, though its pass would have it there."""
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
        predicted=None if applied is None else applied.prediction,
    )


def unverified_certificates(
    result: PipelineResult, passes: Sequence[RewritePass]
) -> list[Certificate]:
    """Of rewrites that nobody checked, and of those that their own pass refused."""
    kept = [
        Certificate(
            *(str(a.rewrite), a.rewrite.fidelity.value, a.label, a.key, a.source),
            status="unverified",
            predicted=a.prediction,
        )
        for a in result.applied
    ]
    failed = result.failures.items()
    return kept + [undone_certificate(identity, reason, passes) for identity, reason in failed]
