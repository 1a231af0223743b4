"""Puts the shim where a build finds it before the compilers."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ir_dataset.extract import shim
from ir_dataset.toolchain import CCompiler

__all__ = ["install_hook", "unoptimised"]

_NAMES = ("gcc", "g++", "cc", "c++", "clang", "clang++", "c89", "c99")
_VERSIONED = re.compile(r"(?:\w+-linux-gnu\w*-)?(?:gcc|g\+\+|clang|clang\+\+)(?:-\d+)?")


def install_hook(
    directory: Path,
    *,
    seen_as: Path,
    compiler: CCompiler,
    unit_s: float,
    python: str = sys.executable,
    embed: bool = False,
    root: Path | None = None,
    aliases: Sequence[tuple[str, str]] = (),
) -> dict[str, str]:
    """Write the shim into `directory/shim`, under every name a C compiler has on this machine.

    Where there is none, the writer of the bitcode does the build as well, under the usual names.
    Bitcode will lie in `directory/drop`, sources in `directory/src`.

    Args:
        directory: the workspace.
        seen_as: the same place as the build sees it.
        compiler: writes the bitcode.
        unit_s: seconds that one unit may take.
        python: runs the shim; has to be reachable for the build.
        embed: have clang do the build itself, with bitcode embedded in the objects (ComPile's way).

        root: the sources' tree; `src` of the workspace unless given.
        aliases: prefixes of paths outside, and what to call them in records: places that differ from
            machine to machine, such as a Python in a home.

    Returns:
        Environment variables for the build.
    """
    place = directory / "shim"
    for folder in (place, directory / "drop"):
        folder.mkdir(exist_ok=True)
    names = _compiler_names()
    settings = {
        "instead": not names,
        "drop": str(seen_as / "drop"),
        "root": str(root or seen_as / "src"),
        "c": [*compiler.c, *_plain(compiler)],
        "cxx": [*compiler.cxx, *_plain(compiler)],
        "zig": compiler.kind == "zig",
        "aliases": [
            *aliases,
            (str(Path(compiler.c[0]).resolve().parent), f"/usr/lib/{compiler.kind}"),
        ],
        "unit_s": unit_s,
        "embed": embed,
    }
    (place / "settings.json").write_text(json.dumps(settings, sort_keys=True))
    script = place / "shim.py"
    text = Path(shim.__file__).read_text(encoding="utf-8")
    script.write_text(f"#!{python} -IS\n{text}", encoding="utf-8")
    script.chmod(0o755)
    for name in names or _NAMES:
        (place / name).unlink(missing_ok=True)
        os.link(script, place / name)  # a symbolic link would be resolved by some build systems
    cache = str(seen_as / "home" / "zig-cache")
    return {
        "PATH": f"{seen_as / 'shim'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "ZIG_GLOBAL_CACHE_DIR": cache,
        "ZIG_LOCAL_CACHE_DIR": cache,
    }


def unoptimised(compiler: CCompiler, *, cxx: bool) -> list[str]:
    """Writes bitcode as for -O2 before LLVM's first pass; source and output are still to be named."""
    writer = compiler.cxx if cxx else compiler.c
    flags = ("-O2", "-g0", "-w", "-Xclang", "-disable-llvm-passes", "-emit-llvm", "-c")
    return [*writer, *_plain(compiler), *flags]


def _plain(compiler: CCompiler) -> list[str]:
    """Zig compiles for this very machine, with checks and without assertions, unless told."""
    if compiler.kind != "zig":
        return []
    target = f"{platform.machine()}-linux-gnu"
    return ["-target", target, "-mcpu=baseline", "-fno-sanitize=undefined", "-UNDEBUG"]


def _compiler_names() -> list[str]:
    """Usual names, and versioned ones that are on the build's PATH."""
    names = {name for name in _NAMES if shutil.which(name)}
    for folder in ("/usr/local/bin", "/usr/bin"):
        names |= {name for name in os.listdir(folder) if _VERSIONED.fullmatch(name)}
    return sorted(names)
