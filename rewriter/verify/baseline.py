"""The original, run once on every scenario, and the distance of other programs to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.errors import VerificationError
from rewriter.program import Program
from rewriter.verify.compare import CANNOT_RUN, logit_metrics, relative_error, relative_l2
from rewriter.verify.inputs import decoding_scenarios, whole_scenarios
from rewriter.verify.scenarios import Runner, Scenario
from rewriter.verify.tolerances import end_to_end_tolerance
from rewriter.verify.verification import Verification

__all__ = ["Baseline", "difference"]

log = logging.getLogger("rewriter")


class Baseline:
    """What the original makes of the scenarios that fit a kind of program.

    Args:
        original: the program others are compared with.
        scenarios: inputs to try; those that the original itself rejects are dropped.

    Raises:
        VerificationError: the original runs on none of them.
    """

    def __init__(self, original: Program, scenarios: Sequence[Scenario]) -> None:
        self.original = original
        self.scenarios: list[Scenario] = []
        self.references: list[tuple[Tensor, ...]] = []
        problem = "no scenario"
        for scenario in scenarios:
            try:
                with torch.no_grad():
                    reference = scenario.reference(original)
            except CANNOT_RUN as error:
                problem = f"{scenario.name}: {type(error).__name__}: {error}"
                log.info("the original does not run on %s", problem)
                continue
            self.scenarios.append(scenario)
            self.references.append(reference)
        if not self.scenarios:
            raise VerificationError(f"the captured program runs on no input tried: {problem}")

    @classmethod
    def whole(cls, original: Program, verification: Verification) -> Baseline:
        """For programs that take whole sequences, or are no language models."""
        return cls(original, whole_scenarios(original, verification))

    @classmethod
    def decoding(cls, original: Program, verification: Verification) -> Baseline:
        """For programs that decode."""
        return cls(original, decoding_scenarios(original, verification))

    @classmethod
    def of_outputs(cls, program: Program, scenarios: Sequence[Scenario]) -> Baseline:
        """What a program itself returns, as the baseline of rewrites of it."""
        own = cls.__new__(cls)
        own.original, own.scenarios = program, list(scenarios)
        own.references = own.outputs(program)
        return own

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs tried, for people."""
        return tuple(scenario.name for scenario in self.scenarios)

    def mismatch(self, program: Program, run: Runner | None = None) -> str:
        """Where a program that claims the original's function differs from it; "" if nowhere.

        Args:
            run: what runs in the place of the program's own module.
        """
        for scenario, expected in zip(self.scenarios, self.references, strict=True):
            try:
                with torch.no_grad():
                    outputs = scenario.candidate(program, run)
            except CANNOT_RUN as error:
                return f"{scenario.name}: {type(error).__name__}: {error}"
            problem = difference(outputs, expected)
            if problem:
                return f"{scenario.name}: {problem}"
        return ""

    def outputs(self, program: Program, run: Runner | None = None) -> list[tuple[Tensor, ...]]:
        """What a program returns in every scenario."""
        with torch.no_grad():
            return [scenario.candidate(program, run) for scenario in self.scenarios]

    def metrics(self, outputs: Sequence[tuple[Tensor, ...]]) -> dict[str, float]:
        """Distance of outputs to the original's: KL and agreement of logits, or relative L2."""
        pairs = list(zip(outputs, self.references, strict=True))
        if self.original.meta.get("kind") != "causal_lm":
            errors = [relative_l2(a, b) for o, r in pairs for a, b in zip(o, r, strict=True)]
            return {"relative_l2": max(errors)}
        ours = torch.cat([o[0].reshape(-1, o[0].shape[-1]) for o, _ in pairs])
        theirs = torch.cat([r[0].reshape(-1, r[0].shape[-1]) for _, r in pairs])
        return logit_metrics(ours, theirs)


def difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """What is wrong with outputs that should be equal up to rounding; "" if nothing."""
    if len(outputs) != len(expected):
        return f"{len(outputs)} outputs instead of {len(expected)}"
    for output, reference in zip(outputs, expected, strict=True):
        if output.dtype != reference.dtype:
            return f"dtype {output.dtype} instead of {reference.dtype}"
        if output.shape != reference.shape:
            return f"shape {list(output.shape)} instead of {list(reference.shape)}"
        error, allowed = relative_error(output, reference), end_to_end_tolerance(reference.dtype)
        if not error <= allowed:
            return f"output differs by {error:.1e} (allowed {allowed:.0e})"
    return ""
