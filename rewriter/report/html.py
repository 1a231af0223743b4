"""A report as one HTML file that steps through the rewrites; nothing is loaded from elsewhere."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from rewriter.cost.cost import Cost
from rewriter.report.files import write_file
from rewriter.report.report import Report, Step
from rewriter.report.side_by_side import readable, side_by_side
from rewriter.verify.certificate import Certificate

__all__ = ["render_html", "write_html"]


def write_html(report: Report, path: Path) -> None:
    """Write the file whole or not at all. Raises ConfigError when it cannot be written."""
    write_file(path, render_html(report).encode(), "html")


def render_html(report: Report) -> str:
    """The whole page as text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(figure=_figure, change=_change)  # pyright: ignore[reportUnknownMemberType]
    folder = resources.files("rewriter.report")
    template = environment.from_string(folder.joinpath("template.html").read_text(encoding="utf-8"))
    steps = [_step(step) for step in report.steps]
    predicted = any(c.predicted for c in report.certificates)
    return template.render(
        report=report, steps=steps, verdict=_verdict(report), predicted=predicted
    )


def _step(step: Step) -> dict[str, Any]:
    before, after = readable(step.code_before), readable(step.code_after)
    return {
        "title": step.title,
        "blocks": side_by_side(before, after),
        "lines": (len(before), len(after)),
        "summary": _summary(step.certificates),
    }


def _verdict(report: Report) -> list[tuple[str, str]]:
    """The outcome in a few words, each with a mood: good, bad or plain."""
    counts = {"applied": 0, "rolled_back": 0, "unverified": 0}
    for certificate in report.certificates:
        counts[certificate.status] += 1
    raised = sum(c.raised for c in report.coverage)
    candidates = sum(c.candidates for c in report.coverage)
    words = [
        (f"{raised} of {candidates} operators raised", "good" if raised == candidates else "bad"),
        (f"{counts['applied']} rewrites verified", "good" if counts["applied"] else "plain"),
    ]
    if counts["unverified"]:
        words.append((f"{counts['unverified']} rewrites unverified", "plain"))
    if counts["rolled_back"]:
        words.append((f"{counts['rolled_back']} undone", "bad"))
    if report.decoding:
        words.append(
            (f"decoding {report.decoding}", "good" if report.decoding == "derived" else "plain")
        )
    return words if report.coverage else words[1:]


def _summary(certificates: tuple[Certificate, ...]) -> str:
    """What a step's rewrites amount to: sites, the worst error, and the cost at one site."""
    kept = [c for c in certificates if c.status != "rolled_back"]
    if not kept:
        return ""
    parts = [f"{len(kept)} site{'s' if len(kept) > 1 else ''}, {kept[0].fidelity}"]
    errors = [c for c in kept if c.implementation_error is not None]
    if errors:
        worst = max(errors, key=lambda c: c.implementation_error or 0.0)
        allowed = f"{_figure(worst.tolerance)} allowed"
        parts.append(f"largest error {_figure(worst.implementation_error)} of {allowed}")
    first = kept[0]
    if first.cost_before and first.cost_after:
        moved = _change(first.cost_before, first.cost_after, "bytes_moved")
        parts.append(f"{moved} bytes moved by a decode step at {first.site}")
    return " · ".join(parts)


def _figure(value: float | None) -> str:
    """Three digits, or a dash."""
    return "–" if value is None else f"{value:.3g}"


def _change(before: Cost | None, after: Cost | None, field: str) -> str:
    """`1.97 M → 394 k (−80 %)`; "" where it was not predicted."""
    if before is None or after is None:
        return ""
    old, new = getattr(before, field), getattr(after, field)
    if old == new:
        return _scaled(old)
    share = f" ({100 * (new - old) / old:+.0f} %)".replace("-", "−") if old else ""
    return f"{_scaled(old)} → {_scaled(new)}{share}"


def _scaled(value: float) -> str:
    for factor, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"
