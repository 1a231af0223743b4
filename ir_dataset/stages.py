"""The stages that work on one input at a time: names, versions, what they take and give.

A stage's key is its name, its version and its input; raise the version when the same input gives
something else, and only what follows from it runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ir_dataset.records import (
    BuildResult,
    Fetched,
    Package,
    Record,
    decode,
    digest,
    encode,
)
from ir_dataset.sources import find_source
from ir_dataset.sources.source import BuildLimits
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain

__all__ = ["STAGES", "BuildInput", "DiscoverInput", "FetchInput", "Packages", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One stage: `function(store, input) -> output`."""

    version: str
    function: Callable[[Store, Any], Any]
    input: type[Any]
    output: Any
    timeout_s: float
    """Wall time of one task; stages with limits of their own end before this."""

    def perform(self, store: Store, payload: bytes) -> str:
        """Run on an encoded input; returns the hash of the stored output."""
        return store.put(encode(self.function(store, decode(payload, self.input))))


class DiscoverInput(Record):
    """A `[[source]]` table."""

    kind: str
    options: dict[str, Any]
    version: str
    """Of the plug-in."""


class Packages(Record):
    """What a source has, sorted by name."""

    packages: tuple[Package, ...]


class FetchInput(Record):
    """A package to fetch."""

    package: Package
    version: str


class BuildInput(Record):
    """A fetched package to build."""

    fetched: Fetched
    version: str
    toolchain: str
    """Fingerprint of the compilers, so that new ones build again."""
    wall_s: float
    unit_s: float
    memory_bytes: int
    disk_bytes: int
    jobs: int


def _discover(store: Store, task: DiscoverInput) -> Packages:
    found = find_source(task.kind).discover(task.options)
    return Packages(packages=tuple(sorted(found, key=lambda package: package.name)))


def _fetch(store: Store, task: FetchInput) -> Fetched:
    with store.workspace(digest("fetch", task)) as workspace:
        return find_source(task.package.source).fetch(task.package, store, workspace)


def _build(store: Store, task: BuildInput) -> BuildResult:
    limits = BuildLimits(
        wall_s=task.wall_s,
        unit_s=task.unit_s,
        memory_bytes=task.memory_bytes,
        disk_bytes=task.disk_bytes,
        jobs=task.jobs,
    )
    source = find_source(task.fetched.package.source)
    with store.workspace(digest("build", task)) as workspace:
        return source.build(
            task.fetched, store, workspace, toolchain=Toolchain.find(), limits=limits
        )


DAY = 86_400.0

STAGES: dict[str, Stage] = {
    "discover": Stage("1", _discover, DiscoverInput, Packages, 600),
    "fetch": Stage("1", _fetch, FetchInput, Fetched, 1200),
    "build": Stage("1", _build, BuildInput, BuildResult, DAY),
}
"""The table: one line a stage."""
