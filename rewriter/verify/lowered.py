"""Does a backend compute what the verified program computes?"""

from __future__ import annotations

import torch

from rewriter.errors import VerificationError
from rewriter.verify.baseline import Baseline, difference
from rewriter.verify.compare import CANNOT_RUN
from rewriter.verify.rollback import Verified
from rewriter.verify.scenarios import Runner

__all__ = ["check_lowered"]


def check_lowered(verified: Verified, run: Runner, backend: str, baseline: Baseline) -> None:
    """Compare what runs with the program, where both are fed the same.

    Args:
        verified: against this baseline.
        run: the lowered program. It is tried on one scenario: in chunks and steps where it decodes
            and is not compiled, which takes a compilation for each.

    Raises:
        VerificationError: it fails or differs.
    """
    tried = 0 if backend == "inductor" else min(1, len(baseline.scenarios) - 1)
    scenario, expected = baseline.scenarios[tried], verified.outputs[tried]
    try:
        with torch.no_grad():
            problem = difference(scenario.candidate(verified.program, run), expected)
    except CANNOT_RUN as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise VerificationError(f"backend {backend} fails on {scenario.name}: {problem}")
