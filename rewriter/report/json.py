"""A report as plain JSON types and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from rewriter.cost.cost import Cost
from rewriter.engine.miss import Miss
from rewriter.errors import ArtifactError
from rewriter.program import BakedDim
from rewriter.report.report import Coverage, Report, Step
from rewriter.verify.certificate import Certificate

__all__ = ["report_from_json", "report_to_json"]

SCHEMA = 1


def report_to_json(report: Report) -> dict[str, Any]:
    """Plain JSON types only; `schema` is the version of this layout."""
    return {"schema": SCHEMA} | dataclasses.asdict(report)


def report_from_json(stored: dict[str, Any]) -> Report:
    """The inverse. Raises ArtifactError for another schema."""
    if stored.get("schema") != SCHEMA:
        raise ArtifactError(f"report has schema {stored.get('schema')!r}; allowed: {SCHEMA}")
    return Report(
        model=stored["model"],
        versions=stored["versions"],
        passes=tuple(stored["passes"]),
        backend=stored["backend"],
        backend_reason=stored["backend_reason"],
        seconds=stored["seconds"],
        baked=tuple(BakedDim(**item) for item in stored["baked"]),
        coverage=tuple(_coverage(item) for item in stored["coverage"]),
        decoding=stored["decoding"],
        certificates=[_certificate(item) for item in stored["certificates"]],
        misses=[_miss(item) for item in stored["misses"]],
        end_to_end=stored["end_to_end"],
        notes=list(stored["notes"]),
        steps=[_step(item) for item in stored["steps"]],
    )


def _coverage(item: dict[str, Any]) -> Coverage:
    return Coverage(**item | {"kinds": tuple(item["kinds"])})


def _miss(item: dict[str, Any]) -> Miss:
    return Miss(**item | {"blocked_by": tuple(item["blocked_by"])})


def _step(item: dict[str, Any]) -> Step:
    certificates = tuple(_certificate(c) for c in item["certificates"])
    return Step(**item | {"certificates": certificates})


def _certificate(item: dict[str, Any]) -> Certificate:
    costs = {
        name: None if item[name] is None else Cost(**item[name])
        for name in ("cost_before", "cost_after")
    }
    return Certificate(**item | costs | {"scenarios": tuple(item["scenarios"])})
