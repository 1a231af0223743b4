"""What a source of IR has to answer: what is there, get it, build it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec

from ir_dataset.records import (
    BuildFailure,
    BuildResult,
    Fetched,
    Package,
    StoredFile,
    TranslationUnit,
)
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError

__all__ = ["BuildLimits", "Source", "build_result", "convert_options", "lay_out"]

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class BuildLimits:
    """How much one package's build may take before it is stopped and what it gave is kept."""

    wall_s: float = 900.0
    unit_s: float = 120.0
    """Wall time of extracting one translation unit."""
    memory_bytes: int = 4 << 30
    """Address space of each process."""
    disk_bytes: int = 8 << 30
    """Growth of the workspace."""
    jobs: int = 1
    """Processes that the build may run beside each other."""


class Source(Protocol):
    """A plug-in. Stateless: everything that a call depends on is in its arguments."""

    name: ClassVar[str]
    version: ClassVar[str]
    """Raised when the same package would give other units, so that old results are not reused."""
    languages: ClassVar[tuple[str, ...]]

    def missing(self, toolchain: Toolchain) -> str | None:
        """Why this source cannot run on this machine, with what to install; None where it can."""
        ...

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """The packages that the configuration's table for this source names, sorted by name.

        `options` is that table less `kind`; a key that is unknown or of a wrong type raises a
        ConfigError with the field. May ask a registry for versions; downloads no package.
        """
        ...

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """Download the package and its licence into the store; the last step with a network.

        Raises:
            SourceError: it is not to be had; says what was tried.
        """
        ...

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """Build in the workspace, sandboxed, and store the bitcode of each unit.

        What was saved before a limit was hit is kept, with `complete=False` and a failure that says so.

        Raises:
            SourceError: nothing could be built.
        """
        ...


def convert_options(options: Mapping[str, Any], kind: type[Options], allowed: str) -> Options:
    """A source's table as the struct that it declares.

    Raises:
        ConfigError: a key is unknown or of a wrong type; `allowed` says what there is.
    """
    try:
        return msgspec.convert(options, kind)
    except msgspec.ValidationError as error:
        raise ConfigError("source", dict(options), f"{allowed} ({error})") from error


def lay_out(files: Iterable[StoredFile], store: Store, into: Path) -> None:
    """Copies of stored files below a directory, by their names."""
    for file in files:
        place = into / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(store.path(file.sha256), place)


def build_result(
    fetched: Fetched,
    units: Iterable[TranslationUnit],
    failures: Iterable[BuildFailure],
    *,
    complete: bool = True,
    log: str = "",
) -> BuildResult:
    """What a build left, in an order that does not depend on which compiler ended first."""
    return BuildResult(
        package=fetched.package,
        units=tuple(sorted(units, key=lambda one: (one.source_path, one.module, one.arguments))),
        failures=tuple(sorted(failures, key=lambda one: (one.source_path, one.reason))),
        license=fetched.license,
        complete=complete,
        log=log,
    )
