"""Raise a captured graph to the dialect: operators are recognised by what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewriter.dialect import OPS
from rewriter.engine.miss import Miss
from rewriter.program import Program
from rewriter.raising.attention import attention_coverage, raise_attention
from rewriter.raising.mlp import raise_mlp
from rewriter.raising.moe import raise_moe
from rewriter.raising.norm import raise_norm
from rewriter.raising.normal_form import normalize
from rewriter.raising.projections import coverage_of_projections, raise_projections
from rewriter.raising.rope import raise_rope
from rewriter.report.report import Coverage

__all__ = ["RaiseResult", "raise_program"]

_STAGES = (raise_norm, raise_rope, raise_mlp, raise_moe, raise_projections)
"""After attention, in this order: rotations are searched between projections and attention."""

_OPERATORS = {
    "raise-norm": ("rms_norm", "layer_norm"),
    "raise-rope": ("rope",),
    "raise-mlp": ("gated_mlp", "mlp"),
    "raise-moe": ("moe",),
}
"""What each stage puts into the graph."""


@dataclass(frozen=True)
class RaiseResult:
    """What raising did not recognise, and how much it did."""

    misses: tuple[Miss, ...]
    coverage: tuple[Coverage, ...]


def raise_program(program: Program) -> RaiseResult:
    """Replace every region that is understood by its dialect operator, in place."""
    normalize(program)
    misses = raise_attention(program)
    normalize(program)
    for stage in _STAGES:
        misses.extend(stage(program))
    normalize(program)
    others = (_coverage(program, subject, misses) for subject in _OPERATORS)
    found = (attention_coverage(program, misses), *others, coverage_of_projections(program))
    return RaiseResult(tuple(misses), tuple(c for c in found if c.candidates))


def _coverage(program: Program, subject: str, misses: Sequence[Miss]) -> Coverage:
    """Operators of one stage in the final graph, and how many candidates it left alone."""
    counts = {name: len(program.calls(OPS[name].overload)) for name in _OPERATORS[subject]}
    raised, missed = sum(counts.values()), sum(miss.subject == subject for miss in misses)
    kinds = tuple(name for name, count in counts.items() if count)
    return Coverage(subject.removeprefix("raise-"), raised, raised + missed, kinds)
