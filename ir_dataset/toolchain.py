"""The compilers and readers of this machine, and whether they are of one LLVM generation.

IR is read only by an LLVM that is not older than its writer, so one generation is pinned for all.
Two sets of tools will do: the distribution's (`clang-22`, `llvm-22`), or pip's (`ziglang`, `llvmlite`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ir_dataset.records import Record, digest
from rewriter.errors import ConfigError, SourceError

__all__ = ["LLVM_BIN", "LLVM_MAJOR", "CCompiler", "ToolRow", "Toolchain"]

LLVM_MAJOR = 22
"""The generation pinned: clang 22, rustc 1.95, llvmlite 0.50 and ziglang 0.17 all are of it."""

LLVM_BIN = "REWRITER_LLVM_BIN"
"""Environment variable: a directory of LLVM tools that goes before all others."""

_APT = f"apt-get install clang-{LLVM_MAJOR} llvm-{LLVM_MAJOR}"
_RUSTUP = "https://rustup.rs, toolchain 1.95"


@dataclass(frozen=True)
class _Known:
    role: str
    """`writer`, `reader` or `tool`."""
    what: str
    install: str
    suffixed: bool = True
    """Whether distributions call it `name-22`."""


_KNOWN: dict[str, _Known] = {
    "clang": _Known("writer", "C, C++", _APT),
    "clang++": _Known("writer", "C, C++", _APT),
    "zig": _Known("writer", "Zig; C, C++ without root", "pip install 'rewriter[zig]'", False),
    "rustc": _Known("writer", "Rust", _RUSTUP, False),
    "cargo": _Known("tool", "builds Rust", _RUSTUP, False),
    "flang": _Known("writer", "Fortran", f"apt-get install flang-{LLVM_MAJOR}"),
    "swift": _Known("writer", "Swift", "https://swift.org/install", False),
    "julia": _Known("writer", "Julia", "https://julialang.org/downloads", False),
    "spack": _Known("tool", "builds Spack packages", "https://spack.io", False),
    "opt": _Known("reader", "verifies, measures, optimises", _APT),
    "llvm-dis": _Known("reader", "text", _APT),
    "llvm-as": _Known("reader", "text to bitcode", _APT),
    "llc": _Known("reader", "machine code", _APT),
    "llvm-nm": _Known("reader", "symbols", _APT),
    "llvm-size": _Known("tool", "section sizes", _APT),
    "llvm-mca": _Known("tool", "cycle estimates", _APT),
    "llvm-objcopy": _Known("tool", "sections", _APT),
    "llvm-ir2vec": _Known("reader", "embeddings", _APT),
    "llvmlite": _Known("reader", "everything without root", "pip install llvmlite", False),
}


_NO_C_COMPILER = (
    f"no C compiler of LLVM {LLVM_MAJOR}: {_KNOWN['clang'].install}, or {_KNOWN['zig'].install}"
)


class ToolRow(Record, frozen=True):
    """One line of `rewriter ir doctor`."""

    name: str
    role: str
    what: str
    path: str
    """Empty where it is absent."""
    llvm_version: str
    """Empty where it is absent or has none of its own."""
    status: str
    """`ok`, `absent` or `mixed`: of another generation than the one pinned."""
    install: str
    """How to get it."""


@dataclass(frozen=True)
class CCompiler:
    """What writes bitcode from C and C++: `clang`, or `zig cc` where there is none."""

    kind: str
    c: tuple[str, ...]
    cxx: tuple[str, ...]
    llvm_version: str

    @property
    def label(self) -> str:
        """As records name it, e.g. `clang 22.1.8`."""
        return f"{'clang' if self.kind == 'clang' else 'zig cc'} {self.llvm_version}"


@dataclass(frozen=True)
class Toolchain:
    """Paths of the tools that were found; versions are asked when they are wanted, once.

    Values are equal and pickle; a tool that is absent has no entry.
    """

    paths: tuple[tuple[str, str], ...]

    @staticmethod
    @functools.cache
    def find() -> Toolchain:
        """Look for every known tool; runs none of them.

        `REWRITER_LLVM_BIN` comes first, then `name-22` on PATH, LLVM's own directory, and `name` on PATH.

        Raises:
            ConfigError: `REWRITER_LLVM_BIN` is set to something that is no directory.
        """
        override = os.environ.get(LLVM_BIN)
        if override and not Path(override).is_dir():
            raise ConfigError(LLVM_BIN, override, "a directory with LLVM's tools")
        found = ((name, _locate(name, known, override)) for name, known in _KNOWN.items())
        return Toolchain(tuple((name, path) for name, path in found if path))

    def get(self, name: str) -> Path | None:
        """Where a tool is, or None. `llvmlite` is the package's directory.

        Raises:
            ConfigError: no tool of this name is known.
        """
        if name not in _KNOWN:
            raise ConfigError("tool", name, f"one of {', '.join(sorted(_KNOWN))}")
        path = dict(self.paths).get(name)
        return Path(path) if path else None

    def need(self, name: str) -> Path:
        """Where a tool is.

        Raises:
            SourceError: it is absent; says how to get it.
        """
        path = self.get(name)
        if path is None:
            raise SourceError(f"{self.why_absent(name)}")
        return path

    def llvm_version(self, name: str) -> str:
        """LLVM's version in a tool, e.g. `22.1.8`; empty where it is absent or has none."""
        path = self.get(name)
        return _llvm_version(name, str(path)) if path else ""

    def reads(self, name: str) -> bool:
        """Whether a tool is there and of the pinned generation."""
        return _major(self.llvm_version(name)) == LLVM_MAJOR

    def why_absent(self, name: str) -> str | None:
        """What `need` would raise; None where the tool is there."""
        return None if self.get(name) else f"{name} is not installed: {_KNOWN[name].install}"

    def why_not(self, name: str) -> str | None:
        """Why a tool cannot be used, absent or not of the pinned generation; None where it can."""
        if absent := self.why_absent(name):
            return absent
        if self.reads(name):
            return None
        told = self.llvm_version(name) or "an unknown version"
        return f"{self.get(name)} is of LLVM {told}: {_KNOWN[name].install}"

    def c_compiler(self) -> CCompiler | None:
        """clang of the pinned generation, else Zig's, else None."""
        clang = self.get("clang")
        if clang and self.reads("clang"):
            plain, driver = (str(clang),), (str(clang), "--driver-mode=g++")
            return CCompiler("clang", plain, driver, self.llvm_version("clang"))
        zig = self.get("zig")
        if zig and self.reads("zig"):
            return CCompiler("zig", (str(zig), "cc"), (str(zig), "c++"), self.llvm_version("zig"))
        return None

    def need_c_compiler(self) -> CCompiler:
        """As `c_compiler`.

        Raises:
            SourceError: there is none; says how to get one.
        """
        found = self.c_compiler()
        if found is None:
            raise SourceError(_NO_C_COMPILER)
        return found

    def why_no_c_compiler(self) -> str | None:
        """What `need_c_compiler` would raise; None where there is one."""
        return None if self.c_compiler() else _NO_C_COMPILER

    def matrix(self) -> tuple[ToolRow, ...]:
        """Every writer, reader and tool, whether it is there or not."""
        return tuple(self._row(name, known) for name, known in _KNOWN.items())

    def mixed(self) -> tuple[str, ...]:
        """Tools of another generation than the one pinned, one sentence each."""
        return tuple(
            f"{row.name} is LLVM {row.llvm_version}, wanted is {LLVM_MAJOR}: {row.install}"
            for row in self.matrix()
            if row.status == "mixed"
        )

    def fingerprint(self) -> str:
        """Changes when a tool comes, goes or has another version; the same wherever they lie."""
        versions = [(name, self.llvm_version(name)) for name, _ in self.paths]
        return digest(LLVM_MAJOR, versions)

    def _row(self, name: str, known: _Known) -> ToolRow:
        version = self.llvm_version(name)
        status = "ok" if not version or _major(version) == LLVM_MAJOR else "mixed"
        path = self.get(name)
        return ToolRow(
            name=name,
            role=known.role,
            what=known.what,
            path=str(path or ""),
            llvm_version=version,
            status=status if path else "absent",
            install=known.install,
        )


def _locate(name: str, known: _Known, override: str | None) -> str | None:
    if name == "llvmlite":
        return _package("llvmlite")
    pinned = f"{name}-{LLVM_MAJOR}"
    if known.suffixed:
        for directory in (override, None, f"/usr/lib/llvm-{LLVM_MAJOR}/bin"):
            names = (pinned, name) if directory else (pinned,)
            for candidate in names:
                found = shutil.which(candidate, path=directory)
                if found:
                    return found
    if name == "zig" and (wheel := _package("ziglang")):
        return str(Path(wheel) / "zig")
    return shutil.which(name)


def _package(name: str) -> str | None:
    found = importlib.util.find_spec(name)
    return str(Path(found.origin).parent) if found and found.origin else None


def _major(version: str) -> int | None:
    return int(version.split(".")[0]) if version else None


@functools.cache
def _llvm_version(name: str, path: str) -> str:
    if name == "llvmlite":
        return _llvmlite_version()
    if name in ("cargo", "spack", "julia", "swift"):
        return ""  # cargo is no compiler; the others' LLVMs do not show in what they print
    arguments = {"rustc": ["-vV"], "zig": ["cc", "--version"]}.get(name, ["--version"])
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(
        r"(?:LLVM|version:?) (?:version:? )?(\d+\.\d+\.\d+)", _relevant(name, done.stdout)
    )
    return found.group(1) if found else ""


def _relevant(name: str, text: str) -> str:
    """rustc gives its own version before LLVM's."""
    return text[text.find("LLVM version") :] if name == "rustc" else text


def _llvmlite_version() -> str:
    from llvmlite.binding import llvm_version_info

    return ".".join(str(part) for part in llvm_version_info)
