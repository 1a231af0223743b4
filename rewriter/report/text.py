"""A report as plain text."""

from __future__ import annotations

from collections import Counter

from rewriter.cost.model import total_prediction
from rewriter.engine.miss import Miss
from rewriter.report.report import Report
from rewriter.verify.certificate import Certificate

__all__ = ["render_text"]

MOST_MISSES = 20


def render_text(report: Report) -> str:
    """Aligned lines: what was raised, what was rewritten and how well, what was not and why."""
    sections = [
        _head(report),
        _table(
            "raised",
            [[c.op, f"{c.raised}/{c.candidates}", ", ".join(c.kinds)] for c in report.coverage],
        ),
        _table("rewrites", _rewrites(report)),
        _table("end to end", [[name, f"{value:.3g}"] for name, value in report.end_to_end.items()]),
        _table("baked in", [[f"{b.input}[{b.dim}] = {b.value}", b.reason] for b in report.baked]),
        _table("undone", _undone(report)),
        _table("not matched", _misses(report)),
        _table("tuning", [[line] for line in report.tuning]),
        _table("notes", [[note] for note in report.notes]),
        _table("seconds", [[name, f"{value:.2f}"] for name, value in report.seconds.items()]),
    ]
    return "\n\n".join(section for section in sections if section)


def _head(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    rows = [
        ["model", report.model],
        ["passes", "; ".join(report.passes) or "none"],
        ["decoding", report.decoding],
        ["backend", f"{report.backend} ({report.backend_reason})" if report.backend else ""],
        ["versions", versions],
    ]
    return _lines([row for row in rows if row[1]])


def _rewrites(report: Report) -> list[list[str]]:
    """One line a pass: how many sites, and the worst of them."""
    rows: list[list[str]] = []
    kept = [c for c in report.certificates if c.status != "rolled_back"]
    for spec in dict.fromkeys(c.spec for c in kept):
        own = [c for c in kept if c.spec == spec]
        sites = f"{len(own)} site{'s' if len(own) > 1 else ''}"
        rows.append([spec, own[0].fidelity, sites, _worst(own), _predicted(own)])
    return rows


def _predicted(certificates: list[Certificate]) -> str:
    """Time of a decode step at all sites; "" where it was not predicted."""
    told = [c.predicted for c in certificates if c.predicted is not None]
    return "" if not told else f"predicted {total_prediction(told)}"


def _worst(certificates: list[Certificate]) -> str:
    if any(c.status == "unverified" for c in certificates):
        return "unverified"
    errors = [(c.implementation_error or 0.0, c.tolerance or 0.0) for c in certificates]
    error, tolerance = max(errors)
    method = max((c.method_error.get("relative_l2", 0.0) for c in certificates), default=0.0)
    return f"error {error:.1e} of {tolerance:.0e} allowed, method {method:.1e}"


def _undone(report: Report) -> list[list[str]]:
    """Equal reasons of a pass together, with the first site."""
    undone = [c for c in report.certificates if c.status == "rolled_back"]
    counts = Counter((c.spec, c.reason) for c in undone)
    first = {(c.spec, c.reason): c.site for c in reversed(undone)}
    return [
        [spec, f"{first[(spec, reason)]}{f' and {count - 1} more' if count > 1 else ''}", reason]
        for (spec, reason), count in counts.items()
    ]


def _misses(report: Report) -> list[list[str]]:
    """Equal reasons together, with the first node they name and its line."""
    counts = Counter((m.subject, m.reason) for m in report.misses)
    first = {(m.subject, m.reason): m for m in reversed(report.misses)}
    rows = [
        [subject, f"{count}x" if count > 1 else "", reason, _place(first[(subject, reason)])]
        for (subject, reason), count in counts.most_common(MOST_MISSES)
    ]
    if len(counts) > MOST_MISSES:
        rows.append(["", "", f"and {len(counts) - MOST_MISSES} more reasons", ""])
    return rows


def _place(miss: Miss) -> str:
    return " at ".join(part for part in (miss.node, miss.source) if part)


def _table(title: str, rows: list[list[str]]) -> str:
    if not rows:
        return ""
    return f"{title}\n" + _lines([["", *row] for row in rows])


def _lines(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(padded)
