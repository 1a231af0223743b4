"""Executables that stand on PATH for compilers that are not installed, and do on files what those do."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ir_dataset.extract import sandbox
from ir_dataset.toolchain import Toolchain

ELF = """
import struct

def elf(name, data):
    "A relocatable object with one section."
    names = b"\\0.shstrtab\\0" + name.encode() + b"\\0"
    start = 64 + len(names)
    table = start + len(data)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\\x7fELF\\x02\\x01\\x01", 1, 62, 1, 0, 0, table, 0,
                         64, 0, 0, 64, 3, 1)
    def section(at, kind, offset, size):
        return struct.pack("<IIQQQQIIQQ", at, kind, 0, 0, offset, size, 0, 0, 1, 0)
    return (header + names + data + section(0, 0, 0, 0) + section(1, 3, 64, len(names))
            + section(11, 1, start, len(data)))
"""


@contextlib.contextmanager
def on_path(monkeypatch, **scripts):
    """Python scripts by name, where builds in the sandbox see them too; gives the directory."""
    reason = sandbox._no_namespaces()
    if reason:
        pytest.skip(f"namespaces are not allowed: {reason}")
    place = Path(tempfile.mkdtemp(prefix="rewriter-fake-"))
    try:
        (place / "bin").mkdir()
        for name, text in scripts.items():
            script = place / "bin" / name
            script.write_text(f"#!/usr/bin/env -S python3 -S\n{text}")
            script.chmod(0o755)
        for folder in (place, place / "bin"):
            folder.chmod(0o755)
        monkeypatch.setenv("PATH", f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}")
        Toolchain.find.cache_clear()
        yield place / "bin"
    finally:
        shutil.rmtree(place)
        Toolchain.find.cache_clear()


def lay_out(place, files):
    """Write texts by relative path."""
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


def fetch_and_build(source, package, store, limits):
    """Both steps in workspaces of their own, as the pipeline runs them."""
    with store.workspace("fetch") as workspace:
        fetched = source.fetch(package, store, workspace)
    with store.workspace("build") as workspace:
        return source.build(fetched, store, workspace, toolchain=Toolchain.find(), limits=limits)
