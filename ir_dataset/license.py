"""The licence of each unit: of its source file and of every file of its tree that it includes.

Copyright is held file by file, and a header's inline functions end in the module. So a unit carries
the licences of all files that went into it, joined by AND; headers of the system are left out, since
their makers let programs be built with them. A file that nothing is known about closes the gate.

Where a package states one expression for everything, a notice at the head of a source file that says
otherwise is heard as well, if the store has the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from ir_dataset.license_terms import evaluate, normalise
from ir_dataset.license_texts import recognise
from ir_dataset.records import BuildResult, License, Record, TranslationUnit
from ir_dataset.store import Store

__all__ = ["UnitLicense", "decide"]

_SYSTEM = ("/usr/include/", "/usr/lib/", "/usr/local/include/")
_WITHIN = ("/ziglang/lib/", "/lib/clang/", "/rustlib/", "/lib/gcc/")
"""Parts of paths of the compilers' own headers, wherever the compiler is installed."""

_HEAD_BYTES = 8192
_SPDX_LINE = re.compile(r"SPDX-License-Identifier:[ \t]*([^\n*]+)")
_GNU_NOTICE = re.compile(
    r"GNU\s+(?:\W\s*)?(?:Lesser\s+|Library\s+|Affero\s+)?General\s+Public\s+License"
)


class UnitLicense(Record, frozen=True):
    """What one unit may be used for, and who says so."""

    unit: int
    """Position in the build result."""
    module: str
    tier: str
    """`a`, `b`, `c` or `none`: see `license_terms`."""
    expression: str
    """SPDX, of all files that went into the unit."""
    origin: str
    files: tuple[str, ...] = ()
    """sha256 of the texts that say so, in the store."""
    why: str = ""
    """The licence, or the file, that the tier is due to."""


@dataclass(frozen=True)
class _Answer:
    """What is known about one file: an expression, or why there is none."""

    expression: str
    why: str = ""


def decide(store: Store, built: BuildResult) -> tuple[UnitLicense, ...]:
    """Decide each unit's licence, in the order of the units."""
    license_ = built.license
    of_file = _reader(store, license_)
    shas = tuple(sorted(file.sha256 for file in license_.files))
    return tuple(
        _decide(index, unit, of_file, _notice(store, unit, license_.kind), license_.origin, shas)
        for index, unit in enumerate(built.units)
    )


def _decide(
    index: int,
    unit: TranslationUnit,
    of_file: Callable[[str], _Answer],
    notice: str,
    origin: str,
    shas: tuple[str, ...],
) -> UnitLicense:
    found: dict[str, str] = {}
    refused = ""
    for path in (unit.source_path, *unit.includes):
        if _is_system(path):
            continue
        answer = _outside(path) or of_file(_clean(path))
        if answer.expression:
            found.setdefault(answer.expression, path)
        else:
            refused = refused or f"{path}: {answer.why}"
    if notice:
        found.setdefault(notice, unit.source_path)
    expression = _all_of(sorted(found))
    terms = evaluate(expression)
    why = terms.why
    if terms.tier not in ("a", "b"):
        worst = next((path for one, path in found.items() if evaluate(one).tier == terms.tier), "")
        why = f"{worst}: {why}" if worst else why
    return UnitLicense(
        unit=index,
        module=unit.module,
        tier="none" if refused else terms.tier,
        expression=terms.expression,
        origin=origin,
        files=shas,
        why=refused or why,
    )


def _all_of(expressions: list[str]) -> str:
    if len(expressions) < 2:
        return "".join(expressions)
    return " AND ".join(
        f"({one})" if " OR " in one or " AND " in one else one for one in expressions
    )


def _clean(path: str) -> str:
    """As copyright files name it: relative, without `./` and `a/../`."""
    parts: list[str] = []
    for part in PurePosixPath(path).parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _is_system(path: str) -> bool:
    return path.startswith("/") and (
        path.startswith(_SYSTEM) or any(part in path for part in _WITHIN)
    )


def _outside(path: str) -> _Answer | None:
    if path.startswith("/") or _clean(path).startswith(".."):
        return _Answer("", "lies outside the package and the system's headers")
    return None


def _reader(store: Store, license_: License) -> Callable[[str], _Answer]:
    """A function from a file's path in the package to what is known about it."""
    if license_.kind == "spdx":
        expression = normalise(license_.expression)
        answer = _Answer(expression, "" if expression else "the package states no licence")
        return lambda path: answer
    if license_.kind == "dep5" and license_.files:
        files = license_.files
        named = [file for file in files if file.name.rpartition("/")[2] == "copyright"]
        return _dep5(store.get((named or files)[0].sha256).decode("utf-8", "replace"))
    return lambda path: _Answer("", "no licence was found for the package")


def _dep5(text: str) -> Callable[[str], _Answer]:
    """By a machine-readable debian/copyright: the last paragraph that matches a path counts.

    A paragraph gives a name, and the text itself or in a paragraph of its own; a text that is known by
    its words counts where the name is not known.
    """
    import warnings

    from debian import copyright as dep5

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns about every oddity that it puts right
            document = dep5.Copyright(text.splitlines(keepends=True), strict=False)
        texts = {
            paragraph.license.synopsis: paragraph.license.text or ""
            for paragraph in document.all_license_paragraphs()
            if paragraph.license
        }
        paragraphs = list(document.all_files_paragraphs())
    except Exception as error:  # whatever a foreign file makes the parser raise, the gate is closed
        reason = f"debian/copyright is not machine-readable: {str(error)[:200]}"
        return lambda path: _Answer("", reason)

    @cache
    def answer(path: str) -> _Answer:
        matching = [paragraph for paragraph in paragraphs if _matches(paragraph, path)]
        if not matching or matching[-1].license is None:
            return _Answer("", "no paragraph of debian/copyright is about it")
        return _named(matching[-1].license, texts)

    return answer


def _matches(paragraph: Any, path: str) -> bool:
    try:
        return paragraph.matches(path)
    except ValueError:  # a pattern with a bad escape matches nothing
        return False


def _named(license_: Any, texts: dict[str, str]) -> _Answer:
    name = license_.synopsis or ""
    expression = normalise(name)
    if evaluate(expression).tier == "none":
        known = recognise(license_.text or texts.get(name, ""))
        expression = known or expression
    return _Answer(expression, "" if expression else "its paragraph names no licence")


def _notice(store: Store, unit: TranslationUnit, kind: str) -> str:
    """What the head of the source file says where the package speaks for all files at once."""
    if kind != "spdx" or not store.has(unit.source_sha256):
        return ""
    head = store.get(unit.source_sha256)[:_HEAD_BYTES].decode("utf-8", "replace")
    named = _SPDX_LINE.search(head)
    if named:
        return normalise(named.group(1).strip())
    return "LicenseRef-GNU-notice" if _GNU_NOTICE.search(head) else ""
