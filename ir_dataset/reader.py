"""Bitcode or assembly in, LLVM assembly out: the text that every other part looks at.

One rule: llvmlite first, in the process, since it reads and prints 39 MB of assembly a second where a
process per module gives 23; `llvm-dis` where llvmlite is not installed or refuses. Both give the same
text: the line that names the file and the index after the last line (ThinLTO's) are left out.

The text depends on the module alone. Each is read in a context of its own, since types of equal names
get numbers in a context that has met them before. LLVM ends the process on some damaged input, so
modules from outside are read in a process that may die; the executors give one.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from typing import Any

from ir_dataset.toolchain import LLVM_MAJOR, Toolchain

__all__ = ["Reading", "is_bitcode", "is_newer", "read_module"]

_MAGIC = (b"BC\xc0\xde", b"\xde\xc0\x17\x0b")
_FLOAT = re.compile(r"\bf0x([0-9A-Fa-f]+)\b")
_NARROW = re.compile(r"\b(half|bfloat)\b")
_INFINITY = re.compile(r"(?<=[ (])([-+])inf\b")
_TYPE = re.compile(r"\b(half|bfloat|float|double)\b")
_INFINITIES = {"half": ("0xH7C00", "0xHFC00"), "bfloat": ("0xR7F80", "0xRFF80")}
_WIDE_INFINITIES = ("0x7FF0000000000000", "0xFFF0000000000000")


@dataclass(frozen=True)
class Reading:
    """A module's text, or why there is none."""

    text: str
    reader: str
    """What read it, e.g. `llvmlite 22.1.0`."""
    reason: str = ""
    """Empty where it was read."""


def is_bitcode(data: bytes) -> bool:
    """Whether the bytes begin like bitcode, bare or wrapped."""
    return data.startswith(_MAGIC)


def read_module(
    data: bytes,
    *,
    writer_llvm: str = "",
    allow_newer: bool = False,
    max_bytes: int = 512 << 20,
) -> Reading:
    """The verified module as assembly.

    Args:
        data: bitcode or assembly.
        writer_llvm: version of the LLVM that wrote it, where known.
        allow_newer: try to read what a newer LLVM wrote; assembly's hexadecimal floats and
            infinities, which LLVM 24 spells `f0x…` and `-inf`, are spelled the old way first.
        max_bytes: larger modules are refused.
    """
    if len(data) > max_bytes:
        return Reading("", "", f"{len(data)} bytes are above the limit of {max_bytes}")
    newer = is_newer(writer_llvm)
    if newer and not allow_newer:
        return Reading("", "", f"written by LLVM {writer_llvm}, newer than the reader's")
    if newer and not is_bitcode(data):
        data = "\n".join(map(_older_floats, data.decode("utf-8", "replace").split("\n"))).encode()
    readings = []
    for read in (_by_llvmlite, _by_llvm_dis):
        readings.append(read(data))
        if not readings[-1].reason:
            return readings[-1]
    return min(readings, key=lambda reading: not reading.reader)


def is_newer(version: str) -> bool:
    """Whether this LLVM is newer than the reader's."""
    found = re.match(r"\d+", version)
    return bool(found) and int(found.group()) > LLVM_MAJOR


@cache
def _llvmlite() -> Any:
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None
    if llvm.llvm_version_info[0] != LLVM_MAJOR:
        return None
    return llvm


def _by_llvmlite(data: bytes) -> Reading:
    llvm = _llvmlite()
    if llvm is None:
        return Reading("", "", f"llvmlite with LLVM {LLVM_MAJOR} is not installed")
    name = "llvmlite " + ".".join(map(str, llvm.llvm_version_info))
    context = llvm.create_context()
    try:
        parse = llvm.parse_bitcode if is_bitcode(data) else llvm.parse_assembly
        source = data if is_bitcode(data) else data.decode("utf-8", "surrogateescape")
        module = parse(source, context=context)
        module.verify()
        return Reading(_canonical(str(module)), name)
    except (RuntimeError, UnicodeError) as error:
        return Reading("", name, _first_line(str(error)))


def _by_llvm_dis(data: bytes) -> Reading:
    name = "llvm-dis" if is_bitcode(data) else "opt"
    tools = Toolchain.find()
    path = tools.get(name)
    if path is None or not tools.reads(name):
        return Reading("", "", f"{name} of LLVM {LLVM_MAJOR} is not installed")
    told = f"{name} {tools.llvm_version(name)}"
    options = ["-o", "-"] if name == "llvm-dis" else ["-S", "-passes=verify", "-o", "-"]
    done = subprocess.run([str(path), *options, "-"], input=data, capture_output=True, check=False)
    if done.returncode:
        return Reading("", told, _first_line(done.stderr.decode("utf-8", "replace")))
    return Reading(_canonical(done.stdout.decode("utf-8", "surrogateescape")), told)


def _canonical(text: str) -> str:
    """Without the file's name at the beginning and the index of summaries at the end."""
    if text.startswith("; ModuleID"):
        text = text[text.find("\n") + 1 :]
    summaries = text.find("\n^0 = ")
    if summaries >= 0:
        text = text[:summaries]
    return text.rstrip("\n") + "\n"


def _first_line(text: str) -> str:
    """What LLVM complains about, on one line, without the excerpt."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower() and "IR parsing error" not in line]
    return re.sub(r"^\S*?(?=error)", "", (told or lines or ["no reason given"])[0])[:300]


def _older_floats(line: str) -> str:
    """LLVM 24's `f0x…` and `-inf` as earlier versions spell them; a float's constant is a double's."""
    if "inf" in line:
        line = _INFINITY.sub(_older_infinity, line)
    if "f0x" not in line:
        return line

    def respell(match: re.Match[str]) -> str:
        digits = match.group(1)
        if len(digits) == 8:
            return f"0x{_widen(int(digits, 16)):016X}"
        if len(digits) == 16:
            return f"0x{digits}"
        narrow = _NARROW.findall(line, 0, match.start())
        if len(digits) == 4 and narrow:
            return ("0xH" if narrow[-1] == "half" else "0xR") + digits
        return match.group()

    return _FLOAT.sub(respell, line)


def _older_infinity(match: re.Match[str]) -> str:
    types = _TYPE.findall(match.string, 0, match.start())
    spelled = _INFINITIES.get(types[-1], _WIDE_INFINITIES) if types else _WIDE_INFINITIES
    return spelled[match[1] == "-"]


def _widen(bits: int) -> int:
    """The bits of a 32-bit float as those of the equal 64-bit one; payloads of NaNs stay."""
    sign, exponent, fraction = bits >> 31, bits >> 23 & 0xFF, bits & 0x7FFFFF
    if not exponent and not fraction:
        return sign << 63
    if not exponent:
        shift = 24 - fraction.bit_length()
        fraction, exponent = fraction << shift & 0x7FFFFF, 1 - shift
    wide = 0x7FF if exponent == 0xFF else exponent + 896
    return sign << 63 | wide << 52 | fraction << 29
