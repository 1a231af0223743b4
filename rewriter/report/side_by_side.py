"""Two versions of a program's code, aligned line by line and coloured, for the HTML report."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Block", "Row", "readable", "side_by_side"]

CONTEXT = 3
"""Unchanged lines shown around a change."""
_ALIKE = 0.5
"""Lines this similar are shown as one line that changed, with the difference marked."""

_FRAME = re.compile(
    r"# File: .*?(?P<file>[^/]+/[^/]+):(?P<line>\d+) in (?P<function>\S+?), code: (?P<code>.*)"
)
_FREES = re.compile(r";  [\w =,]+ = None$")
_HIDDEN = ("= self.", "= getattr(self", "No stacktrace", "class ")
_TOKENS = re.compile(
    r"(?P<comment>\#.*)|(?P<type>:\ \"[^\"]*\")|(?P<dialect>rewriter\.\w+)|(?P<text>'[^']*')"
    r"|(?P<keyword>\b(?:def|return|None|True|False)\b)|(?P<number>(?<![\w.])-?\d[\d.e+-]*)",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Row:
    """One line: its number and coloured text on both sides; None and "" where a side has none."""

    left_number: int | None
    left: Markup | str
    right_number: int | None
    right: Markup | str


@dataclass(frozen=True)
class Block:
    """Consecutive lines: same, change, delete, insert, or folded (unchanged and not shown)."""

    kind: str
    rows: tuple[Row, ...]


def readable(code: str) -> list[str]:
    """Lines of a program without what only the interpreter needs: parameters, frees, long paths."""
    lines: list[str] = []
    for line in code.splitlines():
        line = _FREES.sub("", line).rstrip()
        if not line or any(hidden in line for hidden in _HIDDEN):
            continue
        found = _FRAME.search(line)
        if found:
            line = f"        # {found['file']}:{found['line']} {found['function']}: {found['code']}"
            if lines and lines[-1].lstrip().startswith("#"):
                lines.pop()  # its code was hidden
        line = line.replace("torch.ops.", "").replace("9223372036854775807", "end")
        lines.append(line.replace(", pin_memory = False", "").removeprefix("    "))
    return lines


def side_by_side(before: list[str], after: list[str]) -> list[Block]:
    """Both texts aligned; nothing when they are equal."""
    matcher = difflib.SequenceMatcher(None, _keys(before), _keys(after), autojunk=False)
    blocks: list[Block] = []
    codes = matcher.get_opcodes()
    if all(tag == "equal" for tag, *_ in codes):
        return blocks
    for index, (tag, i1, i2, j1, j2) in enumerate(codes):
        if tag == "equal":
            rows = _pairs(before[i1:i2], after[j1:j2], i1, j1)
            blocks += _folded(rows, first=index == 0, last=index == len(codes) - 1)
        elif tag == "replace":
            blocks.append(Block("change", _changed(before[i1:i2], after[j1:j2], i1, j1)))
        else:
            blocks.append(Block(tag, _pairs(before[i1:i2], after[j1:j2], i1, j1)))
    return blocks


def _keys(lines: list[str]) -> list[str]:
    """What to align by. A comment counts with the code below it: alone it stands in every layer."""
    keys: list[str] = []
    below = ""
    for line in reversed(lines):
        comment = line.lstrip().startswith("#")
        below = below if comment else line
        keys.append(f"{line}\0{below}" if comment else line)
    return keys[::-1]


def _folded(rows: tuple[Row, ...], *, first: bool, last: bool) -> Iterator[Block]:
    """Unchanged lines: those near a change shown, the others folded."""
    start = 0 if first else CONTEXT
    end = len(rows) - (0 if last else CONTEXT)
    if end - start < 2:
        yield Block("same", rows)
        return
    for kind, part in (("same", rows[:start]), ("folded", rows[start:end]), ("same", rows[end:])):
        if part:
            yield Block(kind, part)


def _pairs(left: list[str], right: list[str], i: int, j: int) -> tuple[Row, ...]:
    """Line beside line, the shorter side filled up."""
    rows: list[Row] = []
    for k in range(max(len(left), len(right))):
        a, b = k < len(left), k < len(right)
        rows.append(
            Row(
                i + k + 1 if a else None,
                _coloured(left[k]) if a else "",
                j + k + 1 if b else None,
                _coloured(right[k]) if b else "",
            )
        )
    return tuple(rows)


def _changed(left: list[str], right: list[str], i: int, j: int) -> tuple[Row, ...]:
    """Like `_pairs`; lines that are alike have their difference marked."""
    rows = list(_pairs(left, right, i, j))
    if len(left) != len(right):
        return tuple(rows)
    for k, (a, b) in enumerate(zip(left, right, strict=True)):
        matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
        if matcher.ratio() >= _ALIKE:
            codes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
            marked = _marked(a, [c[1:3] for c in codes]), _marked(b, [c[3:5] for c in codes])
            rows[k] = Row(i + k + 1, marked[0], j + k + 1, marked[1])
    return tuple(rows)


def _marked(line: str, spans: list[tuple[int, int]]) -> Markup:
    out, at = Markup(), 0
    for start, end in spans:
        if start == end:
            continue
        out += (
            escape(line[at:start]) + Markup("<mark>") + escape(line[start:end]) + Markup("</mark>")
        )
        at = end
    return out + escape(line[at:])


def _coloured(line: str) -> Markup:
    """The line with comments, types, dialect operators, texts and numbers wrapped in spans."""
    out, at = Markup(), 0
    for found in _TOKENS.finditer(line):
        name = found.lastgroup or ""
        out += escape(line[at : found.start()])
        out += Markup('<i class="{}">{}</i>').format(name[0], found.group())
        at = found.end()
    return out + escape(line[at:])
