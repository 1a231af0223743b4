"""Debian source packages: C and C++ as a distribution builds them, with licences file by file.

The real build runs with the package's own rules and compiler; the shim on PATH takes the bitcode.
"""

from __future__ import annotations

import re
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec

from ir_dataset.extract.build import HookedBuild, why
from ir_dataset.extract.sandbox import Sandbox
from ir_dataset.records import BuildResult, Fetched, License, Package, StoredFile
from ir_dataset.sources.apt import PROFILES, Apt
from ir_dataset.sources.source import BuildLimits, convert_options, lay_out
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

__all__ = ["Debian", "download", "unpack"]

_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")


class _Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    language: str = "c"
    project: str = ""


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    packages: tuple[str, ...]
    package: dict[str, _Override] = {}
    extract: Literal["shim", "embed"] = "shim"


class Debian:
    """Options.

    `packages`: names of source packages. `package.NAME`: its `language` and `project`. `extract`:
    `shim` beside the package's own compiler, or `embed`, where clang builds the package.
    """

    name: ClassVar[str] = "debian"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("c", "c++")

    def missing(self, toolchain: Toolchain) -> str | None:
        """Needs Debian's tools and a C compiler of the pinned LLVM."""
        for tool, package in (("apt-get", "apt"), ("dpkg-buildpackage", "dpkg-dev")):
            if not shutil.which(tool):
                return f"{tool} is not installed: apt-get install {package} (Debian or Ubuntu only)"
        return toolchain.why_no_c_compiler()

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """Versions from the archive's index, the newest first in `options["versions"]`.

        Raises:
            ConfigError: an option is unknown or of a wrong type, or the archive has no such package.
        """
        wanted = _options(options)
        found = _stanzas(Apt().showsrc(wanted.packages))
        packages = []
        for name in sorted(set(wanted.packages)):
            if name not in found:
                raise ConfigError(
                    "source.packages", name, "source packages of the configured archives"
                )
            override = wanted.package.get(name, _Override())
            newest = found[name][0]
            packages.append(
                Package(
                    source=self.name,
                    name=name,
                    version=newest["Version"],
                    language=override.language,
                    project=override.project or _project(name),
                    url=newest.get("Homepage", ""),
                    options={
                        "versions": [stanza["Version"] for stanza in found[name]],
                        **({"extract": "embed"} if wanted.extract == "embed" else {}),
                    },
                )
            )
        return packages

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """The newest version that the archive still has, its copyright file and build dependencies.

        A security update's .dsc may be gone while the index lists it: the one before it is taken then.
        """
        apt = Apt()
        fetched, dsc = download(apt, package, store, workspace)
        apt.install_build_dependencies(dsc)
        return fetched

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """Unpack and run the `build-arch` target; units are those whose sources are the package's."""
        embed = fetched.package.options.get("extract") == "embed"
        build = HookedBuild.prepare(workspace, toolchain.need_c_compiler(), limits, embed=embed)
        unpack(fetched, store, workspace, build.sandbox, build.environment)
        return build.run(
            fetched,
            store,
            ["dpkg-buildpackage", "-d", "-T", "build-arch"],
            _build_system(workspace / "src"),
            _build_environment(limits.jobs),
        )


def _options(options: Mapping[str, Any]) -> _Options:
    wanted = convert_options(options, _Options, "packages = [names]")
    for name in wanted.packages:
        if not _NAME.fullmatch(name):
            raise ConfigError("source.packages", name, "names of Debian source packages")
    unknown = sorted(set(wanted.package) - set(wanted.packages))
    if unknown:
        raise ConfigError("source.package", unknown, "names that `packages` has too")
    return wanted


def _stanzas(text: str) -> dict[str, list[Mapping[str, str]]]:
    """Source stanzas by package, the newest version first."""
    from debian.deb822 import Sources
    from debian.debian_support import Version

    found: dict[str, dict[str, Mapping[str, str]]] = {}
    for stanza in Sources.iter_paragraphs(text.splitlines(), use_apt_pkg=False):
        found.setdefault(stanza["Package"], {})[stanza["Version"]] = stanza
    return {
        name: [versions[key] for key in sorted(versions, key=Version, reverse=True)]
        for name, versions in found.items()
    }


def _project(name: str) -> str:
    """`lua` for lua5.4, `postgresql` for postgresql-15: versions are of one family."""
    return re.sub(r"(-?\d+(\.\d+)+|-\d+)$", "", name) or name


def download(apt: Apt, package: Package, store: Store, workspace: Path) -> tuple[Fetched, Path]:
    """The newest version that can be had, in the store, and its .dsc; installs nothing.

    Raises:
        SourceError: none can be had.
    """
    tried = []
    for version in package.options["versions"]:
        try:
            apt.download_source(package.name, version, workspace)
        except SourceError as error:
            tried.append(str(error))
            continue
        break
    else:
        raise SourceError(f"{package.name}: no version can be had: {'; '.join(tried)}")
    (dsc,) = workspace.glob("*.dsc")
    license_ = _license(workspace, dsc, store)
    files = tuple(store.put_file(path) for path in sorted(workspace.iterdir()) if path.is_file())
    package = msgspec.structs.replace(package, version=version)
    return Fetched(package=package, files=files, license=license_), dsc


def _license(workspace: Path, dsc: Path, store: Store) -> License:
    """debian/copyright, which most packages have in a form that machines read."""
    text = _copyright(workspace, dsc)
    if text is None:
        return License(kind="none")
    stored = StoredFile(name="debian/copyright", sha256=store.put(text), size=len(text))
    dep5 = b"copyright-format" in text.lstrip()[:400]
    return License(kind="dep5" if dep5 else "none", origin="debian/copyright", files=(stored,))


def _copyright(workspace: Path, dsc: Path) -> bytes | None:
    archives = sorted(workspace.glob("*.debian.tar.*")) or sorted(workspace.glob("*.tar.*"))
    for archive in archives:
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    if re.fullmatch(r"(\./)?([^/]+/)?debian/copyright", member.name):
                        stream = tar.extractfile(member)
                        return stream.read() if stream else None
        except tarfile.ReadError:
            continue
    return _unpacked_copyright(workspace, dsc)


def _unpacked_copyright(workspace: Path, dsc: Path) -> bytes | None:
    """Of formats whose debian/ is a patch, or whose compression Python does not read."""
    import subprocess

    tree = workspace / "unpacked"
    command = ["dpkg-source", "--no-check", "-x", str(dsc), str(tree)]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    try:
        if done.returncode:
            raise SourceError(f"{dsc.name} cannot be unpacked: {done.stderr.strip()[-500:]}")
        path = tree / "debian" / "copyright"
        return path.read_bytes() if path.is_file() and not path.is_symlink() else None
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def unpack(
    fetched: Fetched,
    store: Store,
    workspace: Path,
    sandbox: Sandbox,
    environment: Mapping[str, str],
) -> None:
    """Into `src`, as the user that builds: patches and archives are foreign too."""
    lay_out(fetched.files, store, workspace / "packed")
    (dsc,) = (file.name for file in fetched.files if file.name.endswith(".dsc"))
    command = ["dpkg-source", "--no-check", "--no-copy", "-x", f"../packed/{dsc}", "tree"]
    finished = sandbox.run(command, environment)
    if finished.status or finished.limit:
        raise SourceError(f"{dsc} cannot be unpacked: {why(finished)}: {finished.tail[-500:]}")
    (workspace / "src" / "tree").rename(workspace / "unpacked")
    (workspace / "src").rmdir()
    (workspace / "unpacked").rename(workspace / "src")


def _build_environment(jobs: int) -> dict[str, str]:
    """Debug information is for no use here and costs a third of the time."""
    strip = {f"DEB_{name}_STRIP": "-g" for name in ("CFLAGS", "CXXFLAGS", "OBJCFLAGS")}
    return {
        **strip,
        "DEB_BUILD_OPTIONS": f"nocheck nodoc noautodbgsym terse parallel={jobs}",
        "DEB_BUILD_PROFILES": PROFILES,
    }


def _build_system(tree: Path) -> str:
    for name, system in (
        ("configure.ac", "autoconf"),
        ("configure.in", "autoconf"),
        ("configure", "configure"),
        ("CMakeLists.txt", "cmake"),
        ("meson.build", "meson"),
    ):
        if (tree / name).is_file():
            return f"debian/{system}"
    return "debian/make"
