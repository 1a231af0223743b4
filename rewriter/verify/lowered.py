"""Does a backend compute what the program says?"""

from __future__ import annotations

import torch

from rewriter.errors import VerificationError
from rewriter.program import Program
from rewriter.verify.baseline import Baseline, difference
from rewriter.verify.compare import CANNOT_RUN
from rewriter.verify.scenarios import Runner

__all__ = ["check_lowered"]


def check_lowered(program: Program, run: Runner, backend: str, baseline: Baseline) -> None:
    """Compare what runs with the program, where both are fed the same.

    Args:
        run: the lowered program. One that is compiled is tried on one scenario: each takes a
            compilation.

    Raises:
        VerificationError: it fails or differs.
    """
    tried = baseline.scenarios[:1] if backend == "inductor" else baseline.scenarios
    for scenario in tried:
        try:
            with torch.no_grad():
                expected = scenario.candidate(program)
                problem = difference(scenario.candidate(program, run), expected)
        except CANNOT_RUN as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise VerificationError(f"backend {backend} fails on {scenario.name}: {problem}")
