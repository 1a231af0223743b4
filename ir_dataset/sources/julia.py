"""Julia packages: what Julia precompiles of each, as bitcode before LLVM's passes.

`Base.compilecache` runs a Julia that writes a package's image; `--output-unopt-bc` has it write the
bitcode as well, as members of an archive. Julia's own optimiser has run by then: inference, inlining.
What no precompile statement or method signature asks for is in no image, so it is not here either.

Source of the options: https://docs.julialang.org/en/v1/devdocs/llvm, base/loading.jl of JuliaLang/julia.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from ir_dataset.extract.batch import sandbox_of
from ir_dataset.extract.build import result_of, why
from ir_dataset.extract.collect import files_below
from ir_dataset.reader import is_bitcode
from ir_dataset.records import BuildResult, Fetched, Package, TranslationUnit, digest
from ir_dataset.sources.archive import pack, unpack_into
from ir_dataset.sources.local_tree import sha256_of
from ir_dataset.sources.source import BuildLimits, convert_options
from ir_dataset.sources.swift import package_license
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

__all__ = ["Julia", "members"]

_REQUIREMENT = re.compile(r"([A-Za-z][A-Za-z0-9_]*)(?:@(\d+(?:\.\d+){0,2}))?")
_DEPOT = ".depot.tar"
_NEWEST = "newest"
_OLDEST = (1, 11)
_FLAGS = ("-g0", "--output-unopt-bc")
_PATH = "/usr/local/bin:/usr/bin:/bin"

_FETCH = """\
import Pkg
Pkg.activate("project")
name, version, path = ARGS
if !isempty(path)
    Pkg.develop(path = path)
elseif !isempty(version)
    Pkg.add(name = name, version = version)
else
    Pkg.add(name)
end
for (_, one) in Pkg.dependencies()
    one.name == name && println("rewriter-package\\t", one.version, "\\t", one.source)
end
"""

_BUILD = """\
name, output = ARGS
id = Base.identify_package(name)
id === nothing && error("$name is not in the project")
place = isdefined(Base, :locate_package_load_spec) ?
    Base.locate_package_load_spec(id) : Base.locate_package(id)
println("rewriter-llvm ", Base.libllvm_version)
cache = Base.compilecache(id, place, stderr, stdout; flags = `-g0 --output-unopt-bc $output`)
cache isa Exception && throw(cache)
"""


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    packages: tuple[str, ...] = ()
    path: str = ""
    license: str = ""
    project: str = ""


class Julia:
    """Options.

    `packages`: names, or `Name@version`, of the registry and of the standard library. `path`: besides
    them a directory with a package. `license`: one SPDX expression for all of it; else each package's
    licence text is looked at. `project`: one family for all; else each is its own.
    """

    name: ClassVar[str] = "julia"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("julia",)

    def missing(self, toolchain: Toolchain) -> str | None:
        """Needs Julia, whose `compilecache` takes flags."""
        try:
            release = _release(toolchain.need("julia"))
        except SourceError as error:
            return str(error)
        if tuple(map(int, release.split(".")[:2])) < _OLDEST:
            return f"julia is {release}, needed is 1.11: https://julialang.org/downloads"
        return None

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """The packages; the version of those without one is told by fetching.

        Raises:
            ConfigError: an option is unknown or of a wrong type, or a name or directory is not allowed.
        """
        wanted = _options(options)
        release = _release(Toolchain.find().need("julia"))
        asked = [_asked(text) for text in sorted(set(wanted.packages))]
        asked += [_local(Path(wanted.path))] if wanted.path else []
        return [
            Package(
                source=self.name,
                name=name,
                version=version or _NEWEST,
                language="julia",
                project=wanted.project or name,
                url="" if path else f"https://juliahub.com/ui/Packages/General/{name}",
                options={"path": path, "license": wanted.license, "julia": release},
            )
            for name, version, path in asked
        ]

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """The package's sources, and a depot with it and all it depends on, without a registry.

        Julia's own package manager resolves and downloads, in the sandbox, with a network.
        """
        tree = workspace / "src"
        (tree / "project").mkdir(parents=True)
        path = package.options["path"]
        if path:
            shutil.copytree(path, tree / "package", ignore=shutil.ignore_patterns(".git"))
        version = "" if path or package.version == _NEWEST else package.version
        (tree / "fetch.jl").write_text(_FETCH, encoding="utf-8")
        bindir = _bindir(Toolchain.find().need("julia"))
        sandbox = sandbox_of(workspace, BuildLimits(), bindir.parent)
        finished = sandbox.run(
            [*_command(bindir), "fetch.jl", package.name, version, "package" if path else ""],
            _environment(bindir, sandbox.seen_as),
            network=True,
        )
        told = re.search(r"^rewriter-package\t(\S+)\t(\S+)$", finished.tail, re.MULTILINE)
        if finished.status or finished.limit or not told:
            raise SourceError(
                f"{package.name}: Pkg: {why(finished)}: {finished.tail.strip()[-800:]}"
            )
        place = _as_seen_here(Path(told[2]), sandbox.seen_as, workspace)
        if (
            not place.resolve().is_relative_to(workspace.resolve())
            and bindir.parent not in place.parents
        ):
            raise SourceError(
                f"{package.name}: Pkg put it at {told[2]}, outside of what it was given"
            )
        names = sorted(name for name in files_below(place) if not (place / name).is_symlink())
        files = [store.put_file(place / name, name) for name in names]
        license_ = package_license(package.options["license"], files, store)
        if package.version == _NEWEST:
            package = msgspec.structs.replace(package, version=told[1])
        parts = ("src/project", "src/package", "home/depot/packages", "home/depot/artifacts")
        depot = store.put_file(pack(workspace, parts, workspace / _DEPOT), _DEPOT)
        return Fetched(package=package, files=(*files, depot), license=license_)

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """Precompile the package, without a network; one unit for each part of the image."""
        bindir = _bindir(toolchain.need("julia"))
        (workspace / "src").mkdir()
        (depot,) = (file for file in fetched.files if file.name == _DEPOT)
        shutil.copyfile(store.path(depot.sha256), workspace / _DEPOT)
        unpack_into(workspace / _DEPOT, workspace)
        (workspace / "src" / "build.jl").write_text(_BUILD, encoding="utf-8")
        (workspace / "drop").mkdir()
        sandbox = sandbox_of(workspace, limits, bindir.parent)
        output = sandbox.seen_as / "drop" / "image.a"
        finished = sandbox.run(
            [*_command(bindir), "--project=project", "build.jl", fetched.package.name, str(output)],
            _environment(bindir, sandbox.seen_as),
        )
        image = workspace / "drop" / "image.a"
        data = image.read_bytes() if image.is_file() and not image.is_symlink() else b""
        llvm = re.search(r"^rewriter-llvm (\d+\.\d+\.\d+)", finished.tail, re.MULTILINE)
        version = llvm[1] if llvm else ""
        units = [_unit(fetched, module, version, store) for module in _modules(data)]
        if not units and finished.status == 0 and not finished.limit:
            raise SourceError(f"{fetched.package.name}: Julia wrote no bitcode")
        return result_of(fetched, store, finished, units)


def members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a Unix archive, long names in GNU's way.

    Raises:
        SourceError: it is none, or ends in the middle of a member.
    """
    if not archive.startswith(b"!<arch>\n"):
        raise SourceError("not an archive of object files")
    at, names = 8, b""
    while at + 60 <= len(archive):
        header = archive[at : at + 60]
        digits = header[48:58].strip()
        if header[58:] != b"`\n" or not digits.isdigit() or at + 60 + int(digits) > len(archive):
            raise SourceError(f"an archive of object files is damaged at byte {at}")
        content = archive[at + 60 : at + 60 + int(digits)]
        name = header[:16].rstrip()
        if name == b"//":
            names = content
        elif name not in (b"/", b"/SYM64/"):
            if name[1:].isdigit() and name.startswith(b"/"):
                name = names[int(name[1:]) :].partition(b"\n")[0]
            yield name.removesuffix(b"/").decode("utf-8", "replace"), content
        at += 60 + len(content) + len(content) % 2


def _modules(image: bytes) -> list[bytes]:
    """The code; tables of the image, which Julia writes as modules too, are left out."""
    if not image or is_bitcode(image):
        return [image] if image else []
    return [data for name, data in members(image) if name.startswith("text_unopt")]


def _unit(fetched: Fetched, module: bytes, llvm_version: str, store: Store) -> TranslationUnit:
    package = fetched.package
    own = {file.name: file.sha256 for file in fetched.files if file.name.endswith(".jl")}
    entry = f"src/{package.name}.jl"
    return TranslationUnit(
        module=store.put(module),
        size=len(module),
        language="julia",
        source_path=entry,
        source_sha256=own.get(entry, ""),
        compiler=f"julia {package.options['julia']}",
        llvm_version=llvm_version,
        arguments=_FLAGS,
        build_system="pkg",
        includes=tuple(name for name in sorted(own) if name.startswith("src/") and name != entry),
    )


def _options(options: Mapping[str, Any]) -> _Options:
    wanted = convert_options(options, _Options, "packages = [names], path, license, project")
    if not wanted.packages and not wanted.path:
        raise ConfigError("source.packages", wanted.packages, "one name or more, or `path`")
    for text in wanted.packages:
        if not _REQUIREMENT.fullmatch(text):
            raise ConfigError("source.packages", text, "`Name` or `Name@version`")
    if wanted.path and not (Path(wanted.path) / "Project.toml").is_file():
        raise ConfigError("source.path", wanted.path, "a directory with a Project.toml")
    return wanted


def _asked(text: str) -> tuple[str, str, str]:
    name, _, version = text.partition("@")
    return name, version, ""


def _local(path: Path) -> tuple[str, str, str]:
    """Its version is the hash of its files, whatever its Project.toml says."""
    import tomllib

    try:
        name = tomllib.loads((path / "Project.toml").read_text(encoding="utf-8"))["name"]
    except (ValueError, KeyError) as error:
        raise ConfigError("source.path", str(path), f"a package with a name ({error!r})") from error
    names = sorted(name for name in files_below(path) if not name.startswith(".git/"))
    return str(name), digest([(one, sha256_of(path / one)) for one in names])[:16], str(path)


def _ask(julia: Path, *arguments: str) -> str:
    done = subprocess.run([str(julia), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SourceError(f"{julia} {arguments[0]}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


def _release(julia: Path) -> str:
    """`1.11.2` of `julia version 1.11.2`."""
    told = _ask(julia, "--version")
    found = re.search(r"version (\d+\.\d+\.\d+)", told)
    if not found:
        raise SourceError(f"{julia} --version says {told[:100]!r}")
    return found[1]


def _bindir(julia: Path) -> Path:
    """Of Julia itself, which juliaup's command of the same name only starts."""
    return Path(_ask(julia, "--startup-file=no", "-e", "print(Sys.BINDIR)"))


def _command(bindir: Path) -> list[str]:
    return [str(bindir / "julia"), "--startup-file=no", "--history-file=no", "--color=no"]


def _environment(bindir: Path, seen_as: Path) -> dict[str, str]:
    """One part an image, for any processor of the kind; a depot of its own before Julia's."""
    return {
        "PATH": f"{bindir}:{_PATH}",
        "JULIA_DEPOT_PATH": f"{seen_as / 'home' / 'depot'}:",
        "JULIA_PKG_PRECOMPILE_AUTO": "0",
        "JULIA_IMAGE_THREADS": "1",
        "JULIA_CPU_TARGET": "generic",
        "JULIA_NUM_PRECOMPILE_TASKS": "1",
    }


def _as_seen_here(path: Path, seen_as: Path, workspace: Path) -> Path:
    return workspace / path.relative_to(seen_as) if path.is_relative_to(seen_as) else path
