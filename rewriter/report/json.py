"""A report as plain JSON types and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

from rewriter.cost.cost import Cost
from rewriter.cost.model import Estimate, Prediction
from rewriter.engine.miss import Miss
from rewriter.errors import ArtifactError
from rewriter.program import BakedDim
from rewriter.report.report import Coverage, Report, Step
from rewriter.verify.certificate import Certificate

__all__ = ["report_from_json", "report_to_json"]

SCHEMA = 1


def report_to_json(report: Report) -> dict[str, Any]:
    """Plain JSON types only; `schema` is the version of this layout, "inf" and "nan" are text."""
    return {"schema": SCHEMA} | _finite(dataclasses.asdict(report))


def report_from_json(stored: Any) -> Report:
    """The inverse. Raises ArtifactError for another schema or a damaged report."""
    report = cast("dict[str, Any]", stored) if isinstance(stored, dict) else {}
    schema = report.get("schema")
    if schema != SCHEMA:
        raise ArtifactError(f"report has schema {schema!r}; allowed: {SCHEMA}")
    try:
        return _report(report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"report is damaged: {error!r}") from error


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            items = cast("dict[str, Any]", value)
            return {key: _finite(item) for key, item in items.items()}
        case list() | tuple():
            return [_finite(item) for item in cast("Sequence[Any]", value)]
        case _:
            return value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _report(stored: dict[str, Any]) -> Report:
    return Report(
        model=stored["model"],
        versions=stored["versions"],
        passes=tuple(stored["passes"]),
        backend=stored["backend"],
        backend_reason=stored["backend_reason"],
        seconds=_numbers(stored["seconds"]),
        baked=tuple(BakedDim(**item) for item in stored["baked"]),
        coverage=tuple(_coverage(item) for item in stored["coverage"]),
        decoding=stored["decoding"],
        certificates=[_certificate(item) for item in stored["certificates"]],
        misses=[_miss(item) for item in stored["misses"]],
        end_to_end=_numbers(stored["end_to_end"]),
        notes=list(stored["notes"]),
        tuning=list(stored.get("tuning", [])),  # reports of earlier versions have none
        steps=[_step(item) for item in stored["steps"]],
    )


def _coverage(item: dict[str, Any]) -> Coverage:
    fields: dict[str, Any] = item | {"kinds": tuple(item["kinds"])}
    return Coverage(**fields)


def _miss(item: dict[str, Any]) -> Miss:
    fields: dict[str, Any] = item | {"blocked_by": tuple(item["blocked_by"])}
    return Miss(**fields)


def _step(item: dict[str, Any]) -> Step:
    certificates = tuple(_certificate(c) for c in item["certificates"])
    fields: dict[str, Any] = item | {"certificates": certificates}
    return Step(**fields)


def _certificate(item: dict[str, Any]) -> Certificate:
    fields: dict[str, Any] = item | {"scenarios": tuple(item["scenarios"])}
    fields |= {name: _cost(item[name]) for name in ("cost_before", "cost_after")}
    fields |= {name: _number(item[name]) for name in ("implementation_error", "tolerance")}
    fields |= {name: _numbers(item[name]) for name in ("method_error", "measured_us")}
    fields["predicted"] = _prediction(item.get("predicted"))
    return Certificate(**fields)


def _prediction(item: dict[str, Any] | None) -> Prediction | None:
    if item is None:
        return None
    times = {name: Estimate(**item[name]) for name in ("before", "after")}
    fields: dict[str, Any] = item | times
    return Prediction(**fields)


def _cost(item: dict[str, Any] | None) -> Cost | None:
    if item is None:
        return None
    return Cost(float(item["flops"]), float(item["bytes_moved"]), int(item["launches"]))
