"""What `optimize` did and did not do, as data. `text.py` and `html.py` render it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewriter.engine.miss import Miss
from rewriter.program import BakedDim
from rewriter.verify.certificate import Certificate

__all__ = ["Coverage", "Report", "Step"]


@dataclass(frozen=True)
class Coverage:
    """How many candidates of an operator were raised, counted in the final raised graph."""

    op: str
    raised: int
    candidates: int
    kinds: tuple[str, ...] = ()  # e.g. mask kinds: ("causal", "sliding_window(4096)")


@dataclass(frozen=True)
class Step:
    """One stage or rewrite, for stepping through: the code before and after."""

    title: str
    code_before: str
    code_after: str
    certificates: tuple[Certificate, ...] = ()


@dataclass
class Report:
    """The record of one `optimize` call; travels with the saved program."""

    model: str
    versions: dict[str, str] = field(default_factory=dict[str, str])
    passes: tuple[str, ...] = ()
    backend: str = ""
    backend_reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict[str, float])  # by stage, wall time
    baked: tuple[BakedDim, ...] = ()
    coverage: tuple[Coverage, ...] = ()
    decoding: str = ""  # "derived" or the reason it was not
    certificates: list[Certificate] = field(default_factory=list[Certificate])
    misses: list[Miss] = field(default_factory=list[Miss])
    end_to_end: dict[str, float] = field(default_factory=dict[str, float])  # against the original
    notes: list[str] = field(default_factory=list[str])
    tuning: list[str] = field(default_factory=list[str])  # configurations chosen, and why
    steps: list[Step] = field(default_factory=list[Step])

    def of_passes(self, specs: Iterable[str]) -> Report:
        """A copy that goes on by itself, with these passes."""
        return dataclasses.replace(
            self,
            passes=tuple(specs),
            seconds=dict(self.seconds),
            certificates=list(self.certificates),
            misses=list(self.misses),
            notes=list(self.notes),
            tuning=list(self.tuning),
            steps=list(self.steps),
        )

    def __str__(self) -> str:
        from rewriter.report.text import render_text

        return render_text(self)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only; `from_json` reads it back."""
        from rewriter.report.json import report_to_json

        return report_to_json(self)

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained HTML file that steps through the rewrites."""
        from rewriter.report.html import write_html

        write_html(self, Path(path))
