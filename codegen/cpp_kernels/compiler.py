"""C++ text to a loaded library, by the compiler that torch.compile needs on a CPU anyway."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from codegen.cache import cached_build, cached_text, content_hash
from rewriter import processor
from rewriter.errors import ConfigError, RewriterError

__all__ = [
    "ISAS",
    "CompileError",
    "Compiler",
    "compile_library",
    "find_compiler",
    "inline_headers",
    "machine",
    "why_no_compiler",
]

ISAS: dict[str, tuple[str, ...]] = {
    "native": ("-march=native",),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "neon": ("-march=armv8-a",),
    "scalar": ("-O3",),
}
"""Compiler flags by instruction set. What is compiled runs where it was compiled: `native` is the rule."""

_FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    " -fno-signed-zeros -Wall -Wno-psabi -Wno-unknown-pragmas -Wno-unused-function"
).split()

_HEADERS = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "([A-Za-z0-9_]+\.h)"\n', re.MULTILINE)
_TIMEOUT_S = 300


class CompileError(RewriterError):
    """The compiler refused generated text: a defect of the generator, told with the first messages."""


class Compiler:
    """A C++ compiler that was found and asked for its version."""

    def __init__(self, path: str) -> None:
        self.path = path
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
        self.version = run.stdout.splitlines()[0] if run.returncode == 0 and run.stdout else ""


@functools.cache
def find_compiler() -> Compiler | None:
    """`$CXX` where it is set, else g++, else clang++; None where it, or each of them, does not answer."""
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("g++", "clang++"):
        path = shutil.which(name) if name else None
        if path is not None:
            compiler = Compiler(path)
            if compiler.version:
                return compiler
    return None


def why_no_compiler() -> str | None:
    """What `find_compiler` found missing, as the allowed value; None where there is a compiler."""
    if find_compiler() is not None:
        return None
    asked = os.environ.get("CXX")
    if asked:
        return f"a machine with a C++ compiler; CXX={asked!r} does not answer to --version"
    return "a machine with a C++ compiler; set CXX or install g++, references run without"


def inline_headers(text: str) -> str:
    """The text with the headers of this folder in the place of its `#include "..."` lines, each once."""
    seen: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in seen:
            return ""
        seen.add(name)
        body = (_HEADERS / name).read_text().replace("#pragma once\n", "")
        return f"// ---- {name}\n{_INCLUDE.sub(replace, body)}"

    return _INCLUDE.sub(replace, text)


def compile_library(text: str, *, isa: str = "native") -> ctypes.CDLL:
    """Compile self-contained C++ text, or take it from the cache, and load it.

    Args:
        text: with a plain C interface; headers already inlined.
        isa: a key of `ISAS`.

    Raises:
        ConfigError: no compiler, or an unknown instruction set.
        CompileError: the compiler refused the text.
    """
    if isa not in ISAS:
        raise ConfigError("isa", isa, f"one of {', '.join(ISAS)}")
    compiler = find_compiler()
    if compiler is None:
        raise ConfigError("CXX", os.environ.get("CXX"), why_no_compiler() or "")
    source = cached_text(text, ".cpp")
    flags = [*_FLAGS, *ISAS[isa]]
    runtime = _openmp_runtime()
    key = content_hash(text, compiler.version, " ".join(flags), machine(), str(runtime))

    def build(place: Path) -> None:
        link = [] if runtime is None else [f"-Wl,--no-as-needed,{runtime}"]
        command = [compiler.path, *flags, "-o", str(place), str(source), *link]
        run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        if run.returncode != 0:
            told = "\n".join(line for line in run.stderr.splitlines() if "error" in line)[:2000]
            raise CompileError(f"{compiler.version} refused {source}:\n{told or run.stderr[:2000]}")

    return ctypes.CDLL(str(cached_build(key, ".so", build)))


@functools.cache
def machine() -> str:
    """What `-march=native` depends on: code for another processor would stop with SIGILL."""
    told = processor.values("model name", "flags", "Features", "CPU part")
    lines = (f"{field}: {value}" for field, found in told.items() for value in found)
    return "\n".join(lines) or processor.name()


@functools.cache
def _openmp_runtime() -> Path | None:
    """PyTorch's own OpenMP library where it brings one under a name of its own.

    Two runtimes in one process keep two pools of threads that fight for the cores. A bundled
    `libgomp.so.1` is found by that name, as it is loaded already; a renamed one has to be named.
    """
    folders = (
        Path(torch.__file__).parent / "lib",
        Path(torch.__file__).parent.parent / "torch.libs",
    )
    found = [path for folder in folders for path in sorted(folder.glob("libgomp-*.so*"))]
    return found[0] if found else None
