"""Check each rewritten site against its reference, on what it saw while the program ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rewriter.engine.pipeline import Applied
from rewriter.engine.rewrite_pass import Fidelity, RewritePass
from rewriter.program import Program
from rewriter.verify.compare import CANNOT_RUN, relative_error, relative_l2
from rewriter.verify.recorder import Recording, record
from rewriter.verify.scenarios import Scenario
from rewriter.verify.tolerances import tolerance

__all__ = ["SiteVerdict", "implementation", "method", "recorded", "worse"]

POSITIONS = ("q_positions", "k_positions")
"""Inputs that a decoding program may do without."""

WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""In what a reference is computed to tell its own rounding."""
ROUNDINGS = 3.0
"""How many times the reference's own rounding an output may be off."""
MOST_ROUNDING = {torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
"""But no more than this: wrong masks and positions start above."""


@dataclass(frozen=True)
class SiteVerdict:
    """The worst a site did over the scenarios; `reason` is "" where it may stay."""

    error: float = 0.0
    tolerance: float = 0.0
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether it may stay."""
        return not self.reason


def worse(a: SiteVerdict | None, b: SiteVerdict) -> SiteVerdict:
    """The one that failed, or has the larger error."""
    if a is None or (b.reason and not a.reason):
        return b
    return a if a.reason or a.error > b.error else b


class SiteValues:
    """Looks up a reference's inputs: in the rewritten program, else in the one before any rewrite.

    What a rewrite made dead, such as rotary tables at true positions, is computed from positions alone
    and the same in both.
    """

    def __init__(self, rewritten: Recording, base: Recording | None) -> None:
        self.rewritten, self.base = rewritten, base

    def __call__(self, name: str | None) -> Tensor | None:
        if name in POSITIONS and not self.rewritten.has(name):
            name = "q_positions" if self.rewritten.has("q_positions") else None
        if name is None:
            return None
        if self.rewritten.has(name):
            return self.rewritten.value(name)
        assert self.base is not None
        return self.base.value(name)

    def complete(self, applied: Applied) -> bool:
        """Whether the rewrite's output and all its reference needs were seen."""
        wanted = {name for name in applied.inputs if name is not None} - set(POSITIONS)
        seen = (
            self.rewritten.has(n) or (self.base is not None and self.base.has(n)) for n in wanted
        )
        return self.rewritten.has(applied.after) and all(seen)


def recorded(
    program: Program, base: Program, applied: Sequence[Applied], scenario: Scenario
) -> SiteValues:
    """Run a rewritten program, and the one before it for what is not in it any more."""
    wanted = {n for a in applied for n in (*a.inputs, a.after) if n}
    rewritten = record(program, frozenset(wanted), scenario)
    lost = frozenset(n for n in wanted - set(POSITIONS) if not rewritten.has(n))
    return SiteValues(rewritten, record(base, lost, scenario) if lost else None)


def implementation(applied: Applied, values: SiteValues, scenario: str) -> SiteVerdict | None:
    """The rewrite's output against its reference; None where it cannot be told apart."""
    if not values.complete(applied):
        return None
    output, tensors = values(applied.after), list(map(values, applied.inputs))
    compute = partial(applied.chosen.reference, facts=applied.facts)
    try:
        reference = compute(*tensors)
    except CANNOT_RUN as error:
        reason = f"its reference raises {type(error).__name__}: {error}"
        return SiteVerdict(float("inf"), 0.0, reason)
    allowed = tolerance(applied.rewrite.fidelity, reference.dtype)
    if output is None:
        return SiteVerdict(float("inf"), allowed, "the rewrite's output is not a tensor")
    if output.dtype != reference.dtype:
        reason = f"dtype {output.dtype} instead of {reference.dtype} in {scenario}"
        return SiteVerdict(float("inf"), allowed, reason)
    error, allowed = _judged(output, reference, compute, tensors, allowed)
    if error <= allowed:
        return SiteVerdict(error, allowed)
    reason = f"differs from its reference by {error:.1e} (allowed {allowed:.0e}) in {scenario}"
    return SiteVerdict(error, allowed, reason)


def method(applied: Applied, exact: RewritePass, base: Recording) -> tuple[dict[str, float], str]:
    """The reference against the original operator, on the original's values.

    Args:
        exact: the pass with the knobs at which it claims to equal the original.

    Returns:
        metrics at the knobs really used, and what is wrong at `exact`; "" if nothing.
    """
    if not all(base.has(name) for name in (*filter(None, applied.inputs), applied.before)):
        return {}, ""
    original = base.value(applied.before)
    if original is None:
        return {}, ""
    tensors = [None if name is None else base.value(name) for name in applied.inputs]
    used = applied.chosen.reference(*tensors, facts=applied.facts)
    if used.shape != original.shape:
        return {}, f"its reference has shape {list(used.shape)} instead of {list(original.shape)}"
    same = exact == applied.chosen
    compute = partial(exact.reference, facts=applied.facts)
    claimed = used if same else compute(*tensors)
    fidelity = applied.rewrite.fidelity
    kind = Fidelity.REASSOCIATED if fidelity is Fidelity.APPROXIMATE else fidelity
    allowed = tolerance(kind, original.dtype)
    error, allowed = _judged(original, claimed, compute, tensors, allowed)
    metrics = {"relative_l2": relative_l2(used, original)}
    if error <= allowed:
        return metrics, ""
    at = "" if fidelity is not Fidelity.APPROXIMATE else f" at its exact setting {exact}"
    reason = f"its reference differs from the original by {error:.1e} (allowed {allowed:.0e}){at}"
    return metrics, reason


def _judged(
    output: Tensor,
    reference: Tensor,
    compute: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    allowed: float,
) -> tuple[float, float]:
    """The error of an output and what it may be.

    An intermediate that is rounded in one form and not in the other can be worth more than the table
    allows, behind a softmax over large scores above all. There the reference is computed in a wider
    dtype from the same inputs, and the output may be a few times as far from that as the reference is.
    """
    error, dtype = relative_error(output, reference), reference.dtype
    if error <= allowed or allowed == 0.0 or dtype not in WIDER:
        return error, allowed
    wider = WIDER[dtype]
    wide = compute(*(t.to(wider) if t is not None and t.dtype == dtype else t for t in tensors))
    rounding = relative_error(reference.to(wider), wide)
    allowed = max(allowed, min(ROUNDINGS * rounding, MOST_ROUNDING[dtype]))
    return relative_error(output.to(wider), wide), allowed
