"""Swift packages: built by SwiftPM, each object with the bitcode that its compiler began with.

`-embed-bitcode` has swiftc write bitcode first and compile that: the bitcode, before LLVM's passes, stays
in a section of the object, as in ComPile. `-Onone` leaves out SIL's optimiser. Kept are the objects of the
package's own files; its dependencies may be packages of their own.

Source of the options: https://github.com/llvm/llvm-ir-dataset-utils, swiftlang/swift's test/Driver.
"""

from __future__ import annotations

import json
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
from ir_dataset.extract.embed import read_sections
from ir_dataset.extract.sandbox import Sandbox
from ir_dataset.license_texts import recognise
from ir_dataset.records import (
    BuildFailure,
    BuildResult,
    Fetched,
    License,
    Package,
    StoredFile,
    TranslationUnit,
    digest,
)
from ir_dataset.sources.archive import download, pack, unpack_into, unpack_source
from ir_dataset.sources.local_tree import own_license, sha256_of
from ir_dataset.sources.source import BuildLimits, convert_options, lay_out
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

__all__ = ["Swift", "package_license"]

_MANIFEST = "Package.swift"
_RESOLVED = "dependencies.tar"
_FLAGS = ("-Onone", "-embed-bitcode")
_SECTIONS = ("__LLVM,__bitcode", ".llvmbc")
_OBJECT = re.compile(r"(?P<target>[^/]+)\.build/(?P<file>.+\.swift)\.o")
_PATH = "/usr/local/bin:/usr/bin:/bin"


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str = ""
    url: str = ""
    sha256: str = ""
    name: str = ""
    license: str = ""
    project: str = ""


class Swift:
    """One package, of a directory or of an archive.

    `path`: a directory with a Package.swift. Or `url` and `sha256`: of a tar or zip archive with one
    directory in it. `license`: one SPDX expression for all of it; else its licence text is looked at.
    `name`, `project`: the directory's, or the archive's, name.
    """

    name: ClassVar[str] = "swift"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("swift",)

    def missing(self, toolchain: Toolchain) -> str | None:
        """Needs SwiftPM, which comes with the compiler."""
        return toolchain.why_absent("swift")

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """The package; its version is the hash of its files, or of the archive.

        Raises:
            ConfigError: an option is unknown, of a wrong type, or missing, or there is no such directory.
        """
        wanted = _options(options)
        if wanted.path:
            path = Path(wanted.path)
            version = digest([(name, sha256_of(path / name)) for name in _own_files(path)])
            name = wanted.name or path.resolve().name
        else:
            version = wanted.sha256
            name = wanted.name or re.sub(r"\.(zip|tar|tgz|tar\..*)$", "", Path(wanted.url).name)
        release = _release(Toolchain.find().need("swift"))
        return [
            Package(
                source=self.name,
                name=name,
                version=version[:16],
                language="swift",
                project=wanted.project or name,
                url=wanted.url,
                options={**msgspec.to_builtins(wanted), "swift": release},
            )
        ]

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """The sources, and what SwiftPM resolves the manifest's dependencies to.

        The manifest is a program, so it runs in the sandbox, here with a network.
        """
        wanted = msgspec.convert(
            {name: package.options[name] for name in _Options.__struct_fields__}, _Options
        )
        tree = workspace / "src"
        if wanted.path:
            for name in _own_files(Path(wanted.path)):
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(wanted.path) / name, tree / name)
        else:
            unpack_source(download(wanted.url, wanted.sha256, workspace), workspace)
        if not (tree / _MANIFEST).is_file():
            raise SourceError(f"{package.name}: no {_MANIFEST} at its top")
        files = [store.put_file(tree / name, name) for name in _own_files(tree)]
        license_ = package_license(wanted.license, files, store)
        swift = Toolchain.find().need("swift")
        sandbox = sandbox_of(workspace, BuildLimits(), _toolchain(swift))
        if _dependencies(sandbox, swift, package.name):
            _run(sandbox, swift, package.name, "package", "resolve")
            archive = pack(tree, [".build", "Package.resolved"], workspace / _RESOLVED)
            files.append(store.put_file(archive, f".build/{_RESOLVED}"))
        return Fetched(package=package, files=tuple(files), license=license_)

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """`swift build` without a network; the sandbox is ours, so SwiftPM's own is off."""
        swift = toolchain.need("swift")
        tree = workspace / "src"
        _lay_out(fetched, store, tree)
        sandbox = sandbox_of(workspace, limits, _toolchain(swift))
        flags = [*_FLAGS, "-file-prefix-map", f"{sandbox.seen_as / 'src'}=."]
        command = [str(swift), "build", "-c", "release", "--emit-swift-module-separately"]
        command += ["--disable-sandbox", "--disable-automatic-resolution", "-j", str(limits.jobs)]
        command += [part for flag in flags for part in ("-Xswiftc", flag)]
        finished = sandbox.run(command, _environment(swift))
        units: list[TranslationUnit] = []
        failures: list[BuildFailure] = []
        for object_, source in _objects(tree, [file.name for file in fetched.files]):
            found = _unit(tree, object_, source, fetched.package, store)
            units += [found] if isinstance(found, TranslationUnit) else []
            failures += [found] if isinstance(found, BuildFailure) else []
        if not units and finished.status == 0 and not finished.limit:
            raise SourceError(f"{fetched.package.name}: no object of its own has bitcode")
        return result_of(fetched, store, finished, units, failures)


def package_license(expression: str, files: Sequence[StoredFile], store: Store) -> License:
    """What the configuration says, else the names of the texts at the top, where all of them are known."""
    found = own_license(expression, files)
    texts = [file for file in found.files if not file.name.upper().startswith("NOTICE")]
    if found.kind == "spdx" or not texts:
        return found
    names = {recognise(store.get(file.sha256).decode("utf-8", "replace")) for file in texts}
    if "" in names:
        return found
    return msgspec.structs.replace(found, kind="spdx", expression=" AND ".join(sorted(names)))


def _options(options: Mapping[str, Any]) -> _Options:
    wanted = convert_options(options, _Options, "path, or url and sha256; license, name, project")
    if bool(wanted.path) == bool(wanted.url):
        raise ConfigError(
            "source.path", wanted.path, "a directory where there is no `url`, and vice versa"
        )
    if wanted.path and not (Path(wanted.path) / _MANIFEST).is_file():
        raise ConfigError("source.path", wanted.path, f"a directory with a {_MANIFEST}")
    if wanted.url and not wanted.url.startswith(("https://", "file://")):
        raise ConfigError(
            "source.url", wanted.url, "an address that begins with https:// or file://"
        )
    if wanted.url and not re.fullmatch(r"[0-9a-f]{64}", wanted.sha256):
        raise ConfigError("source.sha256", wanted.sha256, "64 hexadecimal digits, of the archive")
    return wanted


def _own_files(tree: Path) -> list[str]:
    """Without links, and what builds and version control keep there."""
    hidden = (".build/", ".git/", ".swiftpm/")
    names = sorted(name for name in files_below(tree) if not name.startswith(hidden))
    return [name for name in names if not (tree / name).is_symlink()]


def _toolchain(swift: Path) -> Path:
    """The directory that holds `bin`, `lib` and `share` of the compiler, behind links."""
    return swift.resolve().parent.parent


def _environment(swift: Path) -> dict[str, str]:
    return {"PATH": f"{swift.parent}:{swift.resolve().parent}:{_PATH}"}


def _release(swift: Path) -> str:
    """`6.0.3` of `Swift version 6.0.3 (swift-6.0.3-RELEASE)`."""
    done = subprocess.run([str(swift), "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"Swift version (\S+)", done.stdout + done.stderr)
    if done.returncode or not found:
        raise SourceError(f"{swift} --version: {(done.stderr or done.stdout).strip()[-300:]}")
    return found[1]


def _run(sandbox: Sandbox, swift: Path, name: str, *arguments: str) -> str:
    command = [str(swift), *arguments]
    finished = sandbox.run(command, _environment(swift), network=True)
    if finished.status or finished.limit:
        told = f"swift {' '.join(arguments)}: {why(finished)}: {finished.tail.strip()[-800:]}"
        raise SourceError(f"{name}: {told}")
    return finished.tail


def _dependencies(sandbox: Sandbox, swift: Path, name: str) -> list[Any]:
    """Those that the manifest names; SwiftPM may tell of warnings before the JSON."""
    text = _run(sandbox, swift, name, "package", "--disable-sandbox", "dump-package")
    try:
        return json.loads(text[text.index("{") :]).get("dependencies", [])
    except ValueError as error:
        raise SourceError(f"{name}: swift package dump-package gave no JSON: {error}") from error


def _lay_out(fetched: Fetched, store: Store, tree: Path) -> None:
    lay_out(fetched.files, store, tree)
    resolved = tree / ".build" / _RESOLVED
    if resolved.is_file():
        unpack_into(resolved, tree)
        resolved.unlink()


def _objects(tree: Path, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Objects of the package's own Swift files, with the file of each."""
    own = [name for name in names if name.endswith(".swift") and name != _MANIFEST]
    for path in sorted((tree / ".build").rglob("*.swift.o")):
        found = _OBJECT.search(path.relative_to(tree).as_posix())
        if found is None or path.is_symlink():
            continue
        ending = f"/{found['file']}"
        sources = [name for name in own if f"/{name}".endswith(ending)]
        sources = [name for name in sources if f"/{found['target']}/" in f"/{name}"] or sources
        if len(sources) == 1:
            yield path, sources[0]


def _unit(
    tree: Path, path: Path, source: str, package: Package, store: Store
) -> TranslationUnit | BuildFailure:
    sections = read_sections(path.read_bytes())
    data = next((sections[name] for name in _SECTIONS if sections.get(name)), b"")
    if not data:
        return BuildFailure(kind="compile", reason="no bitcode in the object", source_path=source)
    return TranslationUnit(
        module=store.put(data),
        size=len(data),
        language="swift",
        source_path=source,
        source_sha256=sha256_of(tree / source),
        compiler=f"swiftc {package.options['swift']}",
        llvm_version="",
        arguments=_FLAGS,
        build_system="swiftpm",
        opt_level_requested="-Onone",
    )
