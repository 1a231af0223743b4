"""Raise a captured graph to the dialect: operators are recognised by what they compute."""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.engine.miss import Miss
from rewriter.program import Program
from rewriter.raising.attention import attention_coverage, raise_attention
from rewriter.raising.normal_form import normalize
from rewriter.report.report import Coverage

__all__ = ["RaiseResult", "raise_program"]


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
    return RaiseResult(tuple(misses), (attention_coverage(program, misses),))
