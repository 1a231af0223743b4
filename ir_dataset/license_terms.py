"""Licence names as people write them, as SPDX expressions, and which tier each falls into.

Tiers, from the most to the least free to pass on:

- `a`: the four licences that ComPile accepts;
- `b`: permissive as well: whoever passes the work on has at most to keep notices;
- `c`: known, and asks for more (copyleft, share-alike): may be counted here, is never packed;
- `none`: not known, or nothing that allows passing it on. Whatever is in doubt is this.

Of `A OR B` the freer counts, of `A AND B` the stricter; an exception counts where it is known.

Source: https://spdx.org/licenses, https://www.debian.org/doc/packaging-manuals/copyright-format/1.0
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

__all__ = ["TIERS", "Terms", "evaluate", "normalise"]

TIERS = ("a", "b", "c", "none")

_A = ("MIT", "Apache-2.0", "BSD-3-Clause", "BSD-2-Clause")

_B: dict[str, str] = {
    "0BSD": "no condition at all",
    "AFL-3.0": "OSI; keep notices",
    "Apache-1.1": "OSI; keep notices, acknowledgement in documentation",
    "Beerware": "keep the notice",
    "BSD-1-Clause": "OSI; keep the notice in source",
    "BSD-2-Clause-Patent": "OSI; BSD-2-Clause and a patent grant",
    "BSD-3-Clause-LBNL": "OSI; BSD-3-Clause, changes published may be used by LBNL",
    "BSD-4-Clause-UC": "the advertising clause was rescinded by the University in 1999",
    "BSD-Source-Code": "keep notices in source",
    "BSL-1.0": "OSI; keep the notice in source",
    "bzip2-1.0.6": "BSD with a ban on misrepresentation",
    "CC0-1.0": "dedicated to the public",
    "curl": "MIT without the name of the licence",
    "dtoa": "keep the notice",
    "ECL-2.0": "OSI; Apache-2.0 with a narrower patent grant",
    "EFL-2.0": "OSI; keep notices",
    "FSFAP": "keep the notice",
    "FSFUL": "unlimited permission",
    "FSFULLR": "unlimited permission",
    "FTL": "BSD-like; credit in documentation",
    "HPND": "OSI; keep notices",
    "HPND-sell-variant": "HPND that names selling",
    "ICU": "OSI; keep notices",
    "IJG": "keep notices, credit in documentation",
    "Info-ZIP": "OSI-style; keep notices, no misrepresentation",
    "ISC": "OSI; keep the notice",
    "libpng": "zlib's with libpng's notices",
    "Libpng": "zlib's with libpng's notices",
    "libpng-2.0": "zlib's with libpng's notices",
    "libtiff": "HPND that bans using names",
    "LicenseRef-public-domain": "no copyright is claimed",
    "MIT-0": "MIT without the notice",
    "MIT-CMU": "HPND-like; keep notices",
    "MIT-Modern-Variant": "OSI; keep notices",
    "MIT-open-group": "X11 that names The Open Group",
    "MulanPSL-2.0": "OSI; keep notices",
    "NCSA": "OSI; MIT and BSD-3-Clause in one",
    "NTP": "OSI; keep notices",
    "OLDAP-2.8": "OSI; keep notices",
    "OpenSSL": "BSD with advertising clauses, which bind advertisements and not copies",
    "PostgreSQL": "OSI; keep notices",
    "PSF-2.0": "keep notices, tell what was changed",
    "Python-2.0": "OSI; PSF-2.0 with the older notices",
    "SMLNJ": "MIT-like; keep notices",
    "Spencer-86": "no misrepresentation",
    "Spencer-94": "no misrepresentation",
    "Spencer-99": "BSD-like",
    "SSH-short": "keep the notice",
    "SunPro": "keep the notice",
    "TCL": "BSD-like; keep notices",
    "Unicode-3.0": "OSI; keep notices",
    "Unicode-DFS-2015": "keep notices",
    "Unicode-DFS-2016": "OSI; keep notices",
    "Unlicense": "dedicated to the public",
    "UPL-1.0": "OSI; keep notices",
    "W3C": "OSI; keep notices, tell what was changed",
    "WTFPL": "no condition at all",
    "X11": "MIT that bans using the X Consortium's name",
    "Xnet": "OSI; MIT with a choice of law",
    "Zlib": "OSI; no misrepresentation",
    "zlib-acknowledgement": "Zlib with an acknowledgement in documentation",
    "ZPL-2.1": "OSI; keep notices, tell what was changed",
    "blessing": "SQLite's: no condition at all",
}
"""Permissive licences beyond ComPile's four, and why each is one."""

_C = re.compile(
    r"(?:GPL|LGPL|AGPL|GFDL|MPL|EPL|CPL|CDDL|EUPL|OSL|APSL|CECILL|CC-BY-SA|Artistic|QPL|SISSL|IPL|NPL"
    r"|Sleepycat|Ruby|MS-RL|LPL|LPPL|OFL|LicenseRef-GNU-notice)(?:-|$)"
)

_PERMITTING = frozenset({"LLVM-exception", "Swift-exception", "Bison-exception-2.2"})
"""Exceptions that only permit more, so that the licence's own tier holds."""

_ALIASES: dict[str, str] = {
    "expat": "MIT",
    "mit/x11": "X11",
    "mit-style-x11": "X11",
    "x11-style": "X11",
    "mit license": "MIT",
    "the mit license": "MIT",
    "apache-2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd-2": "BSD-2-Clause",
    "bsd2": "BSD-2-Clause",
    "bsd3": "BSD-3-Clause",
    "bsd-4-uc": "BSD-4-Clause-UC",
    "openldap-2.8": "OLDAP-2.8",
    "fsf-unlimited": "FSFUL",
    "fsf-unlimited-permission": "FSFUL",
    "bsd-3": "BSD-3-Clause",
    "2-clause-bsd": "BSD-2-Clause",
    "3-clause-bsd": "BSD-3-Clause",
    "bsd 2-clause": "BSD-2-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "bsd-2-clauses": "BSD-2-Clause",
    "bsd-3-clauses": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "new bsd license": "BSD-3-Clause",
    "modified bsd": "BSD-3-Clause",
    "simplified bsd": "BSD-2-Clause",
    "bsd-3-clause-google": "BSD-3-Clause",
    "bsd-4-clause-uc": "BSD-4-Clause-UC",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "zlib/libpng": "Zlib",
    "zlib license": "Zlib",
    "boost": "BSL-1.0",
    "boost-1.0": "BSL-1.0",
    "bsl-1": "BSL-1.0",
    "cc0": "CC0-1.0",
    "cc-0": "CC0-1.0",
    "public domain": "LicenseRef-public-domain",
    "public-domain": "LicenseRef-public-domain",
    "publicdomain": "LicenseRef-public-domain",
    "pd": "LicenseRef-public-domain",
    "unlicence": "Unlicense",
    "the unlicense": "Unlicense",
    "bzip2": "bzip2-1.0.6",
    "bzip2-1.0.5": "bzip2-1.0.6",
    "libpng-1.6": "libpng-2.0",
    "ncsa/llvm": "NCSA",
    "uiuc": "NCSA",
    "psf": "PSF-2.0",
    "psf-2": "PSF-2.0",
    "python": "Python-2.0",
    "python software foundation license": "PSF-2.0",
    "python-2": "Python-2.0",
    "tcl/tk": "TCL",
    "tcltk": "TCL",
    "freetype": "FTL",
    "ofl": "OFL-1.1",
    "artistic": "Artistic-1.0-Perl",
    "perl": "Artistic-1.0-Perl OR GPL-1.0-or-later",
    "apache-2.0-with-llvm-exception": "Apache-2.0 WITH LLVM-exception",
    "apache-2-llvm-exceptions": "Apache-2.0 WITH LLVM-exception",
    "apache-2.0~llvm": "Apache-2.0 WITH LLVM-exception",
    "apache-2.0-llvm": "Apache-2.0 WITH LLVM-exception",
    "sqlite-blessing": "blessing",
    "unicode": "Unicode-DFS-2016",
    "beer-ware": "Beerware",
}
"""Names that SPDX does not know, in lower case."""

_EXCEPTIONS: dict[str, str] = {
    "llvm": "LLVM-exception",
    "llvm exceptions": "LLVM-exception",
    "gcc": "GCC-exception-3.1",
    "gcc runtime library": "GCC-exception-3.1",
    "gcc-runtime-library": "GCC-exception-3.1",
    "autoconf": "Autoconf-exception-generic",
    "libtool": "Libtool-exception",
    "bison": "Bison-exception-2.2",
    "bison-2.2": "Bison-exception-2.2",
    "openssl": "openvpn-openssl-exception",
    "classpath": "Classpath-exception-2.0",
    "font": "Font-exception-2.0",
}
"""Exceptions as Debian names them, less the word, in lower case."""

_GNU = re.compile(r"(a?l?gpl|gfdl)-?v?(\d)(?:\.(\d+))?(?:\.0)?(\+|-only|-or-later)?", re.IGNORECASE)
_WITH = re.compile(
    r"\s+with\s+(?:the\s+)?(.+?)(?:[-\s]+exceptions?(?:[-\s]?[\d.]+)?)?$", re.IGNORECASE
)


class Terms:
    """A normalised expression and its tier; `why` is for whoever asks why it is not packed."""

    __slots__ = ("expression", "tier", "why")

    def __init__(self, expression: str, tier: str, why: str) -> None:
        self.expression, self.tier, self.why = expression, tier, why


@cache
def _licensing() -> Any:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


@cache
def normalise(text: str) -> str:
    """An SPDX expression for a licence as Debian, Cargo or a Python package states it.

    What is not known becomes `LicenseRef-…`, which no tier holds; empty stays empty.
    """
    text = " ".join(text.split())
    text = re.sub(
        r"\s*(?<![\d.])/\s*(?!(?:x11|libpng|tk|llvm)\b)", " OR ", text, flags=re.IGNORECASE
    )
    text = re.sub(r"(?<=[\d.])\s*/\s*", " OR ", text)
    return _joined(text)


def _joined(text: str) -> str:
    """`A or B, and C` is `(A or B) and C`: a comma binds less than the words."""
    text = text.strip()
    if not text:
        return ""
    if text.startswith("(") and _closing(text) == len(text) - 1:
        return _joined(text[1:-1])
    for separator, word in (
        (r",\s*and(?:/or)?\s+", "AND"),
        (r",\s*or\s+", "OR"),
        (r"\s*[,;|]\s*", "AND"),
        (r"\s+or\s+", "OR"),
        (r"\s+and(?:/or)?\s+|\s+[&+]\s+", "AND"),
    ):
        parts = _split(text, separator)
        if len(parts) > 1:
            inner = dict.fromkeys(_joined(part) for part in parts if part.strip())
            return f" {word} ".join(_wrapped(part) for part in inner if part)
    return _single(text)


def _closing(text: str) -> int:
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return index
    return -1


def _split(text: str, separator: str) -> list[str]:
    """Split at a pattern where no bracket is open."""
    parts, start = [], 0
    for found in re.finditer(separator, text, re.IGNORECASE):
        before = text[: found.start()]
        if before.count("(") == before.count(")"):
            parts.append(text[start : found.start()])
            start = found.end()
    return [*parts, text[start:]]


def _wrapped(expression: str) -> str:
    return f"({expression})" if " OR " in expression or " AND " in expression else expression


def _single(text: str) -> str:
    base, exception = text, ""
    found = _WITH.search(text)
    if found:
        base = text[: found.start()]
        exception = _exception(found.group(1))
    name = _name(base.strip())
    return f"{name} WITH {exception}" if exception else name


def _exception(text: str) -> str:
    known = _licensing().known_symbols
    for candidate in (text, f"{text}-exception"):
        for key, symbol in known.items():
            if key.lower() == candidate.lower() and symbol.is_exception:
                return key
    listed = _EXCEPTIONS.get(text.lower().removesuffix("-exception").strip())
    return listed or "LicenseRef-" + _reference(text)


def _name(text: str) -> str:
    lowered = text.lower()
    if lowered in _ALIASES:
        return _ALIASES[lowered]
    gnu = _GNU.fullmatch(text)
    if gnu:
        name, major, minor, later = gnu.groups()
        suffix = "or-later" if later in ("+", "-or-later") else "only"
        return f"{name.upper()}-{major}.{minor or 0}-{suffix}"
    known = _by_lower_case().get(lowered) or _by_lower_case().get(lowered.removesuffix(" license"))
    return known or "LicenseRef-" + _reference(text)


@cache
def _by_lower_case() -> dict[str, str]:
    return {
        key.lower(): key
        for key, symbol in _licensing().known_symbols.items()
        if not symbol.is_exception
    }


def _reference(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "unnamed"


@cache
def evaluate(expression: str) -> Terms:
    """The tier of a normalised expression."""
    if not expression:
        return Terms("", "none", "no licence is stated")
    try:
        parsed = _licensing().parse(expression, validate=False)
    except Exception as error:  # the parser raises what its scanner raises
        return Terms(expression, "none", f"not an expression: {error}")
    tier, why = _evaluate(parsed)
    return Terms(str(parsed), tier, why)


def _evaluate(node: Any) -> tuple[str, str]:
    licensing = _licensing()
    if isinstance(node, (licensing.AND, licensing.OR)):
        worst = isinstance(node, licensing.AND)
        answers = [_evaluate(part) for part in node.args]
        choose = max if worst else min
        return choose(answers, key=lambda answer: TIERS.index(answer[0]))
    exception = getattr(node, "exception_symbol", None)
    if exception is None:
        return _tier(node.key)
    tier, why = _tier(node.license_symbol.key)
    if tier in ("a", "b") and exception.key not in _PERMITTING:
        return "none", f"exception {exception.key} is not known"
    return tier, why


def _tier(key: str) -> tuple[str, str]:
    if key in _A:
        return "a", f"{key}: one of ComPile's four"
    if key in _B:
        return "b", f"{key}: {_B[key]}"
    if _C.match(key):
        return "c", f"{key} asks for more than notices"
    if key.startswith("LicenseRef-"):
        return "none", f"{key.removeprefix('LicenseRef-')} is no known licence"
    return "none", f"{key} is not on the list of permissive licences"
