"""Check a program that was verified elsewhere again on this machine."""

from __future__ import annotations

from rewriter.errors import VerificationError
from rewriter.program import Program
from rewriter.report.report import Report
from rewriter.verify.baseline import Baseline
from rewriter.verify.scenarios import Runner
from rewriter.verify.verification import Verification

__all__ = ["compare_with"]

CERTIFIED = 1.1
"""Most that a metric may exceed what was certified: the inputs are the same, rounding is not."""
NOISE = 1e-4
"""Nats of mean KL divergence that rounding alone may add, in half precision."""


def compare_with(
    program: Program,
    run: Runner,
    report: Report,
    original: Program | None,
    verification: Verification | None,
) -> dict[str, float]:
    """Metrics of what runs against the original, or against the program itself fed in one call.

    Args:
        run: the lowered program.

    Raises:
        VerificationError: it claims the original's function and differs, or is further from it than
            its certificates say.
    """
    settings = verification or Verification()
    reference = program if original is None else original
    decodes = program.decoding is not None
    baseline = (Baseline.decoding if decodes else Baseline.whole)(reference, settings)
    kept = [c for c in report.certificates if c.status != "rolled_back"]
    approximate = any(c.fidelity == "approximate" for c in kept)
    if not approximate:
        problem = baseline.mismatch(program, run)
        if problem:
            raise VerificationError(f"the optimized model differs from the model: {problem}")
    metrics = baseline.metrics(baseline.outputs(program, run))
    certified = report.end_to_end.get("kl_mean")
    if approximate and original is not None and verification is None and certified is not None:
        _demand_certified(metrics["kl_mean"], certified)
    return metrics


def _demand_certified(found: float, certified: float) -> None:
    if not found <= certified * CERTIFIED + NOISE:
        raise VerificationError(f"kl_mean={found:.3g} exceeds the certified {certified:.3g}")
