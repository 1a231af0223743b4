"""Where IR comes from: one plug-in a file, one line a plug-in."""

from __future__ import annotations

import functools
import importlib

from ir_dataset.sources.source import BuildLimits, Source
from rewriter.errors import ConfigError

__all__ = ["SOURCES", "BuildLimits", "Source", "find_source"]

SOURCES: dict[str, str] = {
    "compile-commands": "ir_dataset.sources.compile_commands:CompileCommands",
    "debian": "ir_dataset.sources.debian:Debian",
    "debian-crates": "ir_dataset.sources.debian_crates:DebianCrates",
    "fortran": "ir_dataset.sources.fortran:Fortran",
    "julia": "ir_dataset.sources.julia:Julia",
    "local-tree": "ir_dataset.sources.local_tree:LocalTree",
    "own-kernels": "ir_dataset.sources.own_kernels:OwnKernels",
    "pypi-sdist": "ir_dataset.sources.pypi_sdist:PypiSdist",
    "spack": "ir_dataset.sources.spack:Spack",
    "swift": "ir_dataset.sources.swift:Swift",
    "zig-std": "ir_dataset.sources.zig_std:ZigStd",
}
"""By the `kind` of a `[[source]]` table: module and class, imported when asked for."""


@functools.cache
def find_source(kind: str) -> Source:
    """The plug-in of this kind.

    Raises:
        ConfigError: there is none; lists those there are.
    """
    if kind not in SOURCES:
        raise ConfigError("source.kind", kind, f"one of {', '.join(sorted(SOURCES))}")
    module, _, name = SOURCES[kind].partition(":")
    return getattr(importlib.import_module(module), name)()
