"""What stages hand to each other: frozen records, written as canonical JSON.

Every record is a value. Two records with equal fields have equal bytes, so the hash of a stage's
input is a hash of what the input says, and a stage that ran before is found by it.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import msgspec

from rewriter.errors import ArtifactError

__all__ = [
    "BuildFailure",
    "BuildResult",
    "Fetched",
    "License",
    "Package",
    "Record",
    "StoredFile",
    "TranslationUnit",
    "decode",
    "digest",
    "encode",
]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records: immutable, compared by value."""


class Package(Record, frozen=True):
    """One thing to build, as a source lists it."""

    source: str
    """Name of the source plug-in."""
    name: str
    version: str
    language: str
    """`c`, `c++`, `rust`, `zig`, `fortran`, `triton`, …; a unit may say otherwise."""
    project: str
    """Family that splits keep together: the upstream project, whatever the version or flavour."""
    url: str = ""
    """Where upstream's text came from."""
    options: dict[str, Any] = {}
    """What the plug-in needs to fetch and build it; part of the identity."""


class StoredFile(Record, frozen=True):
    """A file whose bytes lie in the store."""

    name: str
    sha256: str
    size: int


class License(Record, frozen=True):
    """What is known about a package's licence before each unit's is decided.

    `kind` says how to read it: `dep5` (a machine-readable debian/copyright, in `files`), `spdx` (one
    expression for everything), `none` (nothing was found).
    """

    kind: str
    expression: str = ""
    origin: str = ""
    """Who says so: `debian/copyright`, `Cargo.toml`, `PKG-INFO`, `configuration`, …"""
    files: tuple[StoredFile, ...] = ()


class Fetched(Record, frozen=True):
    """A package with everything that its build needs, none of it on the network any more."""

    package: Package
    files: tuple[StoredFile, ...]
    license: License


class TranslationUnit(Record, frozen=True):
    """One compilation that was seen, and the unoptimised bitcode it gives."""

    module: str
    """sha256 of the bitcode in the store."""
    size: int
    language: str
    source_path: str
    """Relative to the package's tree, `/`-separated."""
    source_sha256: str
    compiler: str
    """What wrote the bitcode, e.g. `clang 22.1.8`."""
    llvm_version: str
    """Of the writer, e.g. `22.1.8`."""
    arguments: tuple[str, ...]
    """The front end's command line, without input and output, the build directory as `.`."""
    build_system: str
    opt_level_requested: str = ""
    """`-O2`, or empty where the command line had none."""
    forced_o2: bool = False
    """True where -O0 or no level was replaced, so that functions carry no `optnone`."""
    dropped_flags: tuple[str, ...] = ()
    includes: tuple[str, ...] = ()
    """Files read besides the source: relative to the tree, or absolute for the system's."""
    optimized: bool = False
    """True where the writer has no way to give unoptimised IR."""


class BuildFailure(Record, frozen=True):
    """A unit, or a whole package where `source_path` is empty, that gave no bitcode, and why."""

    kind: str
    """`compile`, `build`, `timeout`, `disk`, `memory`, `tool`."""
    reason: str
    source_path: str = ""


class BuildResult(Record, frozen=True):
    """What a build left: complete or not, every unit that was saved counts."""

    package: Package
    units: tuple[TranslationUnit, ...]
    """Sorted by source path, module and arguments."""
    failures: tuple[BuildFailure, ...]
    license: License
    complete: bool
    """False where the build stopped before its end."""
    log: str = ""
    """sha256 of the end of the build's output in the store."""


R = TypeVar("R")


def encode(record: Any) -> bytes:
    """Canonical JSON: keys sorted, no spaces, UTF-8; equal values give equal bytes."""
    return msgspec.json.encode(record, order="sorted")


def decode(data: bytes, kind: type[R]) -> R:
    """The record in `data`.

    Raises:
        ArtifactError: the text is not JSON, or not a record of this kind; names the field.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ArtifactError(f"stored record is no {kind}: {error}") from error


def digest(*parts: Any) -> str:
    """sha256 over the canonical JSON of the parts, in order."""
    return hashlib.sha256(encode(parts)).hexdigest()
