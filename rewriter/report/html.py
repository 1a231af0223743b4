"""A report as one HTML file that steps through the rewrites; nothing is loaded from elsewhere."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from rewriter.errors import ConfigError
from rewriter.report.report import Report

__all__ = ["render_html", "write_html"]

CONTEXT = 3
"""Unchanged lines shown around a change."""

FRAME = re.compile(r"# File: .*?(?P<file>[^/]+/[^/]+):(?P<line>\d+) in (?P<function>\w+), code: (?P<code>.*)")


@dataclass(frozen=True)
class Row:
    """One line of a side-by-side comparison: kind is same, change, delete, insert or gap."""

    kind: str
    left_number: int | None
    left: str
    right_number: int | None
    right: str


def write_html(report: Report, path: Path) -> None:
    """Write the file whole or not at all. Raises ConfigError when it cannot be written."""
    text = render_html(report)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError("html", str(path), f"a writable file ({error.strerror})") from error


def render_html(report: Report) -> str:
    """The whole page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("rewriter.report").joinpath("template.html").read_text(encoding="utf-8")
    steps = [
        {
            "title": step.title,
            "rows": side_by_side(readable(step.code_before), readable(step.code_after)),
            "certificates": step.certificates,
            "lines": (step.code_before.count("\n"), step.code_after.count("\n")),
        }
        for step in report.steps
    ]
    return environment.from_string(source).render(report=report, steps=steps, number=number)


def readable(code: str) -> list[str]:
    """Lines of a program without what only the interpreter needs: parameters, frees, library paths."""
    lines = []
    for line in code.splitlines():
        line = re.sub(r";  [\w =,]+ = None$", "", line).rstrip()
        found = FRAME.search(line)
        if found:
            line = f"        # {found['file']}:{found['line']} {found['function']}: {found['code']}"
        if "= self." not in line and "= getattr(self" not in line and "No stacktrace" not in line:
            lines.append(line.replace("torch.ops.", "").removeprefix("    "))
    return lines


def side_by_side(before: list[str], after: list[str]) -> list[Row]:
    """Both texts aligned, unchanged stretches collapsed."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    rows: list[Row] = []
    for group in matcher.get_grouped_opcodes(CONTEXT):
        start = group[0][1]
        if start or rows:
            rows.append(Row("gap", None, "", None, ""))
        for tag, i1, i2, j1, j2 in group:
            rows += _block(tag, before, after, (i1, i2, j1, j2))
    return rows


def _block(
    tag: str, before: list[str], after: list[str], span: tuple[int, int, int, int]
) -> list[Row]:
    i1, i2, j1, j2 = span
    kind = {"equal": "same", "replace": "change"}.get(tag, tag)
    rows = []
    for offset in range(max(i2 - i1, j2 - j1)):
        i, j = i1 + offset, j1 + offset
        left, right = i < i2, j < j2
        rows.append(
            Row(
                kind,
                i + 1 if left else None,
                before[i] if left else "",
                j + 1 if right else None,
                after[j] if right else "",
            )
        )
    return rows


def number(value: float | None) -> str:
    """A figure with three digits, or a dash."""
    return "–" if value is None else f"{value:.3g}"
