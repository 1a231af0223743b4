"""Fortran by flang: the sources of Debian packages, LAPACK and BLAS by default, file by file.

flang has no way to leave out its passes; what its front end writes at -O0 has none run over it. Files
that use a module are compiled again after the file that defines it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import msgspec

from ir_dataset.extract.batch import OUTPUT, Batch, BatchUnit, sandbox_of
from ir_dataset.records import BuildResult, Fetched, Package, StoredFile, TranslationUnit
from ir_dataset.sources.apt import Apt
from ir_dataset.sources.debian import Debian, download, unpack
from ir_dataset.sources.source import BuildLimits, convert_options
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain

__all__ = ["Fortran"]

_SUFFIXES = frozenset(".f .for .ftn .f77 .f90 .f95 .f03 .f08 .F .FOR .F90 .F95 .F03 .F08".split())
_PREPROCESSED = re.compile(r"\.F\w*")
_INCLUDE = re.compile(rb"^\s*(?:#\s*)?include\s+['\"]([^'\"]+)['\"]", re.IGNORECASE | re.MULTILINE)
_ROUNDS = 4
"""How long a chain of modules that use each other may be."""


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    packages: tuple[str, ...] = ("lapack",)
    directories: tuple[str, ...] = ("SRC", "BLAS/SRC")
    limit: int = 0


class Fortran:
    """Options, all with defaults.

    `packages` (`["lapack"]`): Debian source packages. `directories` (`["SRC", "BLAS/SRC"]`): which of
    their directories are compiled, with what is below; `["."]` is everything; LAPACK has `INSTALL` and
    `TESTING` too. `limit` (0, none): at most this many files of a package, the first by name.
    """

    name: ClassVar[str] = "fortran"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("fortran",)

    def missing(self, toolchain: Toolchain) -> str | None:
        """Needs flang of the pinned LLVM, and apt."""
        return toolchain.why_not("flang") or Debian().missing(toolchain)

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """The packages in the versions of the archive's index.

        Raises:
            ConfigError: an option is unknown or of a wrong type, or there is no such package.
        """
        wanted = convert_options(options, _Options, "packages, directories, limit")
        how = {"directories": list(wanted.directories), "limit": wanted.limit}
        return [
            msgspec.structs.replace(
                package, source=self.name, language="fortran", options=package.options | how
            )
            for package in Debian().discover({"packages": list(wanted.packages)})
        ]

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """The source package; nothing is installed."""
        return download(Apt(), package, store, workspace)[0]

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """Compile each file."""
        flang = toolchain.need("flang")
        sandbox = sandbox_of(workspace, limits, flang.resolve().parent)
        unpack(fetched, store, workspace, sandbox, {"PATH": "/usr/local/bin:/usr/bin:/bin"})
        tree = workspace / "src"
        (tree / ".modules").mkdir()
        options = fetched.package.options
        paths = list(_sources(tree, options["directories"]))[: options["limit"] or None]
        version = toolchain.llvm_version("flang")
        units = [_unit(tree, path, str(flang), version, store) for path in paths]
        return Batch(units=units, environment={}, rounds=_ROUNDS).run(
            fetched, store, sandbox, limits
        )


def _sources(tree: Path, directories: Sequence[str]) -> Iterator[str]:
    """Fortran files, relative, sorted; links are not followed."""
    found = {
        path.relative_to(tree).as_posix()
        for directory in directories
        for path in (tree / directory).rglob("*")
        if path.suffix in _SUFFIXES and path.is_file() and not path.is_symlink()
    }
    yield from sorted(found)


def _unit(tree: Path, path: str, flang: str, version: str, store: Store) -> BatchUnit:
    stored: StoredFile = store.put_file(tree / path)
    folder = PurePosixPath(path).parent.as_posix()
    arguments = ["-fc1", "-emit-llvm-bc", "-O0", "-module-dir", ".modules"]
    arguments += ["-I", ".modules", "-I", folder]
    if _PREPROCESSED.fullmatch(PurePosixPath(path).suffix):
        arguments.append("-cpp")
    unit = TranslationUnit(
        module="",
        size=0,
        language="fortran",
        source_path=path,
        source_sha256=stored.sha256,
        compiler=f"flang {version}",
        llvm_version=version,
        arguments=tuple(arguments),
        build_system="flang",
        opt_level_requested="-O0",
        includes=tuple(_includes(tree, path)),
    )
    return BatchUnit(unit=unit, attempts=((flang, *arguments, "-o", OUTPUT, path),))


def _includes(tree: Path, path: str) -> Iterator[str]:
    """Files beside the source that it names in INCLUDE lines."""
    folder = PurePosixPath(path).parent
    names = {
        found.decode("utf-8", "replace") for found in _INCLUDE.findall((tree / path).read_bytes())
    }
    for name in sorted(names):
        if (tree / folder / name).is_file():
            yield (folder / name).as_posix()
