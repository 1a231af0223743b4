"""Source distributions from PyPI: the C and C++ of Python's extension modules.

Fetching gets the archive and the wheels that its build asks for; `pip wheel` then builds in the sandbox
from those alone. Whatever of an sdist is executed, is executed in the sandbox, fetching included.
"""

from __future__ import annotations

import email.parser
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import msgspec

from ir_dataset.extract.batch import sandbox_of
from ir_dataset.extract.build import HookedBuild
from ir_dataset.records import BuildResult, Fetched, License, Package, StoredFile
from ir_dataset.sources.archive import unpack_source
from ir_dataset.sources.source import BuildLimits, convert_options, lay_out
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

__all__ = ["PypiSdist"]

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:==([A-Za-z0-9.!+_-]+))?")
_LICENSES = re.compile(r"(?i)(LICEN[CS]E|COPYING|NOTICE|UNLICENSE)[^/]*")

_CLASSIFIERS = {
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "zlib/libpng License": "Zlib",
    "Boost Software License 1.0 (BSL-1.0)": "BSL-1.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication": "CC0-1.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
"""Those that name one licence. "BSD License" may be any of several, and is left to the texts."""


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    packages: tuple[str, ...]
    language: str = "c"


class PypiSdist:
    """`packages`: names, or `name==version`; `language`: of the packages, `c` unless given."""

    name: ClassVar[str] = "pypi-sdist"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("c", "c++")

    def missing(self, toolchain: Toolchain) -> str | None:
        """Needs pip and a C compiler of the pinned LLVM; it does the build too where there is no other."""
        if subprocess.run([*_PIP, "--version"], capture_output=True, check=False).returncode:
            return f"pip is not installed for {sys.executable}: python -m ensurepip"
        return toolchain.why_no_c_compiler()

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """Versions are the newest that the index has, unless given.

        Raises:
            ConfigError: an option is unknown or of a wrong type, or the index has no such package.
        """
        wanted = _options(options)
        packages = []
        for text in sorted(set(wanted.packages)):
            found = _REQUIREMENT.fullmatch(text)
            if not found:
                raise ConfigError("source.packages", text, "`name` or `name==version`")
            name, version = found.groups()
            name = re.sub(r"[-_.]+", "-", name).lower()
            packages.append(
                Package(
                    source=self.name,
                    name=name,
                    version=version or _newest(name),
                    language=wanted.language,
                    project=name.removeprefix("python-"),
                    url=f"https://pypi.org/project/{name}/",
                )
            )
        return packages

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """The sdist, and wheels of what its `[build-system]` requires."""
        packed = workspace / "src" / "packed"
        packed.mkdir(parents=True)
        sandbox = sandbox_of(workspace, BuildLimits(wall_s=600))
        pinned = f"{package.name}=={package.version}"
        _download(sandbox, "packed", "--no-deps", "--no-binary", package.name, pinned)
        (archive,) = (path for path in packed.iterdir() if path.is_file())
        members = _texts(archive)
        requires = _requires(members.get("pyproject.toml", b""))
        _download(sandbox, "wheels", "--only-binary=:all:", *requires)
        wheels = sorted((workspace / "src" / "wheels").glob("*.whl"))
        files = [store.put_file(archive), *(store.put_file(wheel) for wheel in wheels)]
        return Fetched(package=package, files=tuple(files), license=_license(members, store))

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """`pip wheel` of the unpacked archive, in place, so that what it generates stays."""
        headers = Path(sysconfig.get_path("include"))
        aliases = [(str(headers.parent), "/usr/include"), (sys.prefix, "/usr")]
        compiler = toolchain.need_c_compiler()
        build = HookedBuild.prepare(workspace, compiler, limits, aliases=aliases)
        archive = fetched.files[0]
        packed = workspace / "packed"
        lay_out(fetched.files, store, packed)
        unpack_source(packed / archive.name, workspace)
        command = [*_PIP, "wheel", "--no-deps", "--no-index", "--no-cache-dir", "--find-links"]
        command += ["../packed", "--wheel-dir", "../tmp", "-v", "."]
        environment = {**_QUIET, "MAX_JOBS": str(limits.jobs)}
        return build.run(fetched, store, command, self.name, environment)


_PIP = [sys.executable, "-m", "pip"]
_QUIET = {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}


def _options(options: Mapping[str, Any]) -> _Options:
    return convert_options(options, _Options, "packages = [names]")


def _newest(name: str) -> str:
    done = subprocess.run(
        [*_PIP, "index", "versions", name], capture_output=True, text=True, check=False
    )
    found = re.search(r"\((\S+)\)", done.stdout)
    if done.returncode or not found:
        told = done.stderr.strip().splitlines() or ["no version"]
        raise ConfigError("source.packages", name, f"packages of the index ({told[0]})")
    return found.group(1)


def _download(sandbox: Any, into: str, *arguments: str) -> None:
    """`pip download`, which asks an sdist about itself by running it."""
    command = [*_PIP, "download", "--no-cache-dir", "-q", "-d", into, *arguments]
    path = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    finished = sandbox.run(command, {**_QUIET, **path}, network=True)
    if finished.status or finished.limit:
        raise SourceError(f"pip download {arguments[-1]} failed: {finished.tail.strip()[-800:]}")


def _texts(archive: Path) -> dict[str, bytes]:
    """pyproject.toml, PKG-INFO and licence texts at the top of an archive."""
    return {
        PurePosixPath(name).name: data
        for name, data in _members(archive)
        if len(PurePosixPath(name).parts) == 2
    }


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    def wanted(name: str) -> bool:
        last = PurePosixPath(name).name
        return last in ("pyproject.toml", "PKG-INFO") or bool(_LICENSES.fullmatch(last))

    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as packed:
            names = [name for name in packed.namelist() if wanted(name)]
            yield from ((name, packed.read(name)) for name in names)
        return
    with tarfile.open(archive) as packed:
        for member in packed:
            if member.isfile() and wanted(member.name):
                stream = packed.extractfile(member)
                yield member.name, stream.read() if stream else b""


def _requires(pyproject: bytes) -> list[str]:
    """What PEP 518 says the build needs; setuptools where it says nothing."""
    try:
        table = tomllib.loads(pyproject.decode("utf-8")).get("build-system", {})
    except (ValueError, UnicodeDecodeError) as error:
        raise SourceError(f"pyproject.toml cannot be read: {error}") from error
    return table.get("requires") or ["setuptools>=40.8.0", "wheel"]


def _license(members: Mapping[str, bytes], store: Store) -> License:
    """The metadata's expression or classifiers; the texts are kept beside it."""
    files = tuple(
        StoredFile(name=name, sha256=store.put(data), size=len(data))
        for name, data in sorted(members.items())
        if _LICENSES.fullmatch(name)
    )
    metadata = email.parser.BytesParser().parsebytes(members.get("PKG-INFO", b""))
    expression = _expression(metadata)
    if expression:
        return License(kind="spdx", expression=expression, origin="PKG-INFO", files=files)
    return License(kind="none", origin=files[0].name if files else "", files=files)


def _expression(metadata: Message) -> str:
    if metadata.get("License-Expression"):
        return str(metadata["License-Expression"])
    classifiers = [
        str(line).rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier", [])
        if str(line).startswith("License :: ") and str(line) != "License :: OSI Approved"
    ]
    if not classifiers or not all(line in _CLASSIFIERS for line in classifiers):
        return ""
    return " AND ".join(sorted({_CLASSIFIERS[line] for line in classifiers}))
