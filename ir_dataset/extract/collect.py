"""What the shim left in the drop directory, as records in a fixed order."""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from ir_dataset.records import BuildFailure, TranslationUnit
from ir_dataset.store import Store
from ir_dataset.toolchain import CCompiler

__all__ = ["collect", "files_below"]

T = TypeVar("T")


def collect(
    drop: Path,
    tree: Path,
    store: Store,
    *,
    compiler: CCompiler,
    build_system: str,
    before: frozenset[str],
    keep_vanished: bool = False,
) -> tuple[tuple[TranslationUnit, ...], tuple[BuildFailure, ...]]:
    """Store the bitcode, and say where each came from.

    Args:
        drop: the shim's directory.
        tree: the package's sources, after the build.
        before: files of the tree before the build, as `files_below` gives them.
        keep_vanished: keep units whose source was made by the build and is gone. It is off by default,
            because those are what configure scripts try out.

    Returns:
        Units, by source path, module and arguments; failures, by source path and reason. Faults of the
        shim itself are failures of kind `tool`.
    """

    def wanted(path: str) -> bool:
        return keep_vanished or path in before or (tree / path).is_file()

    units = []
    failures = [
        BuildFailure(**found)
        for found in _read(drop, ".failed.json")
        if wanted(found["source_path"])
    ]
    for found in _read(drop, ".json"):
        if not wanted(found["source_path"]):
            continue
        stored = store.put_file(drop / f"{found.pop('key')}.bc")
        del found["directory"]
        for name in ("arguments", "dropped_flags", "includes"):
            found[name] = tuple(found[name])
        units.append(
            TranslationUnit(
                module=stored.sha256,
                size=stored.size,
                compiler=compiler.label,
                llvm_version=compiler.llvm_version,
                build_system=build_system,
                **found,
            )
        )
    failures += [
        BuildFailure(kind="tool", reason=line) for line in _lines(drop / "shim-errors.log")
    ]
    units.sort(key=lambda one: (one.source_path, one.module, one.arguments))
    failures.sort(key=lambda one: (one.source_path, one.kind, one.reason))
    return tuple(_unique(units)), tuple(_unique(failures))


def files_below(tree: Path) -> frozenset[str]:
    """Regular files, relative, with `/`."""
    return frozenset(
        os.path.relpath(os.path.join(folder, name), tree)
        for folder, _, names in os.walk(tree)
        for name in names
    )


def _unique(ordered: list[T]) -> Iterator[T]:
    """Equal records stand side by side: another directory may have compiled the same."""
    return (one for one, _ in itertools.groupby(ordered))


def _read(drop: Path, ending: str) -> Iterator[dict[str, Any]]:
    """Descriptions in the drop directory; what the build put there besides is not followed."""
    for path in sorted(drop.glob(f"*{ending}")):
        if (ending == ".json" and path.name.endswith(".failed.json")) or not _is_plain(path):
            continue
        found = json.loads(path.read_bytes())
        if ending == ".json":
            found["key"] = path.name.removesuffix(ending)
            if not _is_plain(drop / f"{found['key']}.bc"):
                continue
        yield found


def _lines(path: Path) -> list[str]:
    if not _is_plain(path):
        return []
    return sorted(set(path.read_text(encoding="utf-8", errors="replace").splitlines()))[:20]


def _is_plain(path: Path) -> bool:
    """Neither a link nor a pipe."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False
