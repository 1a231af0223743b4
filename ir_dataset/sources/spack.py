"""Spack packages: C and C++ as high-performance computing builds them, with licences from the recipes.

Spack's wrappers call the compiler by its path, so the configuration names the shim as the compiler. Kept
is what compiles the package itself; its dependencies may be packages of their own. Fetching concretizes
and makes a mirror of all sources; building takes everything from there.

Source of the options: https://spack.readthedocs.io/en/latest (mirrors, packages.yaml, environments).
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from ir_dataset.extract.batch import sandbox_of
from ir_dataset.extract.build import HookedBuild, why
from ir_dataset.records import BuildResult, Fetched, License, Package, TranslationUnit
from ir_dataset.sources.archive import pack, unpack_into
from ir_dataset.sources.source import BuildLimits, convert_options
from ir_dataset.store import Store
from ir_dataset.toolchain import CCompiler, Toolchain
from rewriter.errors import ConfigError, SourceError

__all__ = ["Spack", "licenses"]

_SPEC = re.compile(r"(?P<name>[a-z0-9][a-z0-9_-]*)(?P<rest>[@+~ ][A-Za-z0-9@+~:=.,_ -]*)?")
_STAGED = re.compile(r"stage/(?:[^/]+/)?spack-stage-(?P<stage>[^/]+)/(?:spack-src/)?(?P<file>.+)")
_NEWEST = "newest"
_LOCK = "spack.lock"
_KEPT = ("home/mirror", "home/spack-user")
"""What fetching leaves for the build: sources; recipes, and what Spack bootstrapped itself with."""
_PLACE = "@workspace@"
"""Stands in the lock file for where the sandbox shows the workspace."""
_INCLUDES = "/usr/include/spack"
"""How records call the dependencies' headers: as the system's, which they are to the package."""


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    packages: tuple[str, ...]
    license: str = ""
    language: str = "c"


class Spack:
    """Options.

    `packages`: specs, `zlib` or `zlib@1.3.1 +pic`. `license`: one SPDX expression for all; else what each
    recipe says. `language` (`c`): of the packages; each unit's is its own.
    """

    name: ClassVar[str] = "spack"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("c", "c++")

    def missing(self, toolchain: Toolchain) -> str | None:
        """Needs Spack 1.0, whose compilers are packages, gcc, and a C compiler of the pinned LLVM."""
        try:
            release = _output(toolchain.need("spack"), "--version")
        except SourceError as error:
            return str(error)
        if not re.match(r"[1-9]\d*\.", release):
            return f"spack is {release.split()[0]}, needed is 1.0: https://spack.io"
        if not (shutil.which("gcc") and shutil.which("g++")):
            return "no gcc for the packages' own build: apt-get install g++"
        return toolchain.why_no_c_compiler()

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """The specs as they are; concretizing, which is a part of fetching, tells versions.

        Raises:
            ConfigError: an option is unknown or of a wrong type, or a spec is not allowed.
        """
        wanted = convert_options(options, _Options, "packages = [specs], license, language")
        return [self._package(spec, wanted) for spec in sorted(set(wanted.packages))]

    def _package(self, spec: str, wanted: _Options) -> Package:
        found = _SPEC.fullmatch(spec)
        if not found:
            raise ConfigError("source.packages", spec, "specs such as `zlib` or `zlib@1.3.1 +pic`")
        return Package(
            source=self.name,
            name=found["name"],
            version=_NEWEST,
            language=wanted.language,
            project=found["name"],
            options={"spec": spec, "license": wanted.license},
        )

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """The lock file, a mirror of the sources of the package and its dependencies, and the recipes.

        Recipes are programs, so Spack runs in the sandbox, here with a network.
        """
        spack = Toolchain.find().need("spack")
        compiler = Toolchain.find().need_c_compiler()
        build = _prepare(workspace, spack, compiler, BuildLimits(wall_s=1200.0))
        place = _environment(workspace, package, build.sandbox.seen_as, mirror=False)
        seen = str(build.sandbox.seen_as)
        _run(build, spack, package, "-e", "environment", "concretize", "--fresh")
        mirror = ("mirror", "create", "-a", "--directory", f"{seen}/home/mirror")
        _run(build, spack, package, "-e", "environment", *mirror)
        about = _run(build, spack, package, "info", package.name)
        lock = (place / _LOCK).read_text(encoding="utf-8")
        homepage = re.search(r"^Homepage:\s*(\S+)", about, re.MULTILINE)
        expression = package.options["license"] or licenses(about)
        origin = "configuration" if package.options["license"] else "package.py"
        package = msgspec.structs.replace(
            package, version=_version(lock, package.name), url=homepage[1] if homepage else ""
        )
        written = workspace / _LOCK
        written.write_text(lock.replace(seen, _PLACE), encoding="utf-8")
        return Fetched(
            package=package,
            files=(
                store.put_file(written),
                store.put_file(pack(workspace, _KEPT, workspace / "spack.tar")),
            ),
            license=License(kind="spdx", expression=expression, origin=origin)
            if expression
            else License(kind="none"),
        )

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """Install the dependencies, then the package itself where the shim looks, without a network."""
        spack = toolchain.need("spack")
        lock, archive = fetched.files
        shutil.copyfile(store.path(archive.sha256), workspace / archive.name)
        unpack_into(workspace / archive.name, workspace)
        build = _prepare(workspace, spack, toolchain.need_c_compiler(), limits)
        seen = build.sandbox.seen_as
        place = _environment(workspace, fetched.package, seen, mirror=True)
        text = store.get(lock.sha256).decode("utf-8").replace(_PLACE, str(seen))
        (place / _LOCK).write_text(text, encoding="utf-8")
        install = f"install --only-concrete --use-buildcache never -j {limits.jobs}"
        elsewhere = f"-c 'config:build_stage:[{seen}/tmp/stage]'"
        script = (
            f'"$0" {elsewhere} -e environment {install} --only dependencies &&'
            f' exec "$0" -e environment {install} --only package --keep-stage'
        )
        command = ["sh", "-c", script, str(spack)]
        result = build.run(fetched, store, command, self.name, _variables(seen))
        own = f"{fetched.package.name}-{fetched.package.version}-"
        units = [unit for unit in result.units if _staged(unit.source_path, own)]
        failures = [
            msgspec.structs.replace(one, source_path=_staged(one.source_path, own))
            for one in result.failures
            if not one.source_path or _staged(one.source_path, own)
        ]
        if not units:
            raise SourceError(f"{fetched.package.name}: no unit of its own was compiled")
        return msgspec.structs.replace(
            result,
            units=tuple(sorted((_renamed(unit, own) for unit in units), key=_order)),
            failures=tuple(failures),
        )


def licenses(about: str) -> str:
    """The SPDX expression under `Licenses:` in what `spack info` says; empty where there is none.

    Licences that go with versions are all asked for: which of them applies is not looked at.
    """
    found = re.search(r"^Licenses:[ \t]*\n((?:[ \t]+\S.*\n?)+)", about, re.MULTILINE)
    lines = found[1].splitlines() if found else []
    names = sorted({re.split(r"\s{2,}", line.strip())[0] for line in lines} - {"None", ""})
    if len(names) < 2:
        return "".join(names)
    return " AND ".join(f"({name})" if " OR " in name else name for name in names)


def _prepare(workspace: Path, spack: Path, compiler: CCompiler, limits: BuildLimits) -> HookedBuild:
    installed = sandbox_of(workspace, limits).seen_as / "home" / "installed"
    build = HookedBuild.prepare(workspace, compiler, limits, aliases=[(str(installed), _INCLUDES)])
    shown = (*build.sandbox.shown, spack.resolve().parent.parent)
    return replace(build, sandbox=replace(build.sandbox, shown=shown))


def _environment(workspace: Path, package: Package, seen: Path, *, mirror: bool) -> Path:
    """Spack's environment, which holds all of its configuration; JSON is YAML."""
    place = workspace / "src" / "environment"
    place.mkdir(parents=True)
    release = _output(Path(shutil.which("gcc") or "gcc"), "-dumpfullversion")
    gcc = {
        "spec": f"gcc@{release} languages:='c,c++'",
        "prefix": "/usr",
        "extra_attributes": {
            "compilers": {"c": str(seen / "shim" / "gcc"), "cxx": str(seen / "shim" / "g++")}
        },
    }
    told: dict[str, Any] = {
        "specs": [package.options["spec"]],
        "view": False,
        "concretizer": {"unify": True, "reuse": False},
        "config": {
            "install_tree": {"root": str(seen / "home" / "installed")},
            "build_stage": [str(seen / "src" / "stage")],
            "source_cache": str(seen / "home" / "spack-sources"),
            "misc_cache": str(seen / "home" / "spack-misc"),
        },
        "packages": {
            "all": {"require": [f"target={platform.machine()}"]},
            "gcc": {"externals": [gcc], "buildable": False},
        },
    }
    if mirror:
        told["mirrors"] = {"fetched": f"file://{seen}/home/mirror"}
    (place / "spack.yaml").write_text(json.dumps({"spack": told}, indent=1), encoding="utf-8")
    return place


def _variables(seen: Path) -> dict[str, str]:
    """Nothing of the user's own configuration, and no place of the user's to write to."""
    return {
        "SPACK_DISABLE_LOCAL_CONFIG": "1",
        "SPACK_USER_CACHE_PATH": str(seen / "home" / "spack-user"),
    }


def _run(build: HookedBuild, spack: Path, package: Package, *arguments: str) -> str:
    environment = {**build.environment, **_variables(build.sandbox.seen_as)}
    finished = build.sandbox.run([str(spack), *arguments], environment, network=True)
    if finished.status or finished.limit:
        told = f"{why(finished)}: {finished.tail.strip()[-800:]}"
        raise SourceError(f"{package.name}: spack {' '.join(arguments)}: {told}")
    return finished.tail


def _output(tool: Path, argument: str) -> str:
    done = subprocess.run([str(tool), argument], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise SourceError(f"{tool} {argument}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


def _version(lock: str, name: str) -> str:
    """What the lock file says that the package became."""
    try:
        specs = json.loads(lock)["concrete_specs"].values()
        return next(str(spec["version"]) for spec in specs if spec["name"] == name)
    except (ValueError, KeyError, StopIteration) as error:
        raise SourceError(f"{name}: {_LOCK} does not tell its version ({error!r})") from error


def _staged(path: str, own: str) -> str:
    """The path in the package's sources; empty for those of others."""
    found = _STAGED.fullmatch(path)
    return found["file"] if found and found["stage"].startswith(own) else ""


def _renamed(unit: TranslationUnit, own: str) -> TranslationUnit:
    return msgspec.structs.replace(
        unit,
        source_path=_staged(unit.source_path, own),
        includes=tuple(_staged(path, own) or path for path in unit.includes),
    )


def _order(unit: TranslationUnit) -> tuple[str, str, tuple[str, ...]]:
    return unit.source_path, unit.module, unit.arguments
