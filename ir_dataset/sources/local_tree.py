"""A directory of one's own: C and C++ compiled file by file, and IR taken as it is.

Nothing of it is executed, so there is no sandbox; `zig cc` compiles and llvmlite assembles where there
is no clang and no LLVM.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from ir_dataset.extract.collect import collect, files_below
from ir_dataset.extract.hook import install_hook
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
from ir_dataset.sources.source import BuildLimits, build_result, convert_options, lay_out
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

__all__ = ["LocalTree", "own_license", "sha256_of"]

_CXX = (".cc", ".cp", ".cpp", ".cxx", ".c++", ".C")
_COMPILED = (".c", *_CXX)
_MODULES = (".ll", ".bc")
_LICENSES = ("LICENSE", "LICENCE", "COPYING", "UNLICENSE", "NOTICE")


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    name: str = ""
    license: str = ""
    flags: tuple[str, ...] = ("-O2",)
    language: str = "c"
    project: str = ""
    optimized: bool = False


class LocalTree:
    """Options.

    `path`: the directory. `license`: one SPDX expression for all of it; else its LICENSE files are
    looked at. `flags` (`["-O2"]`): of the front end. `language` (`c`): of `.ll` and `.bc` files.
    `optimized` (false): whether those were written after LLVM's passes. `name`, `project`: the
    directory's name.
    """

    name: ClassVar[str] = "local-tree"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("c", "c++", "llvm")

    def missing(self, toolchain: Toolchain) -> str | None:
        """Needs a C compiler or a reader of the pinned LLVM; which of them depends on the files."""
        if toolchain.c_compiler() or toolchain.reads("llvmlite") or toolchain.reads("llvm-as"):
            return None
        return "neither a C compiler nor llvmlite: pip install 'rewriter[ir,zig]'"

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """One package; its version is the hash of the directory's files.

        Raises:
            ConfigError: an option is unknown or of a wrong type, or there is no such directory.
        """
        wanted = _options(options)
        path = Path(wanted.path)
        content = [(name, sha256_of(path / name)) for name in sorted(files_below(path))]
        name = wanted.name or path.name
        return [
            Package(
                source=self.name,
                name=name,
                version=digest(content)[:16],
                language=wanted.language,
                project=wanted.project or name,
                options=msgspec.to_builtins(wanted),
            )
        ]

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """Every file of the directory, since sources include others."""
        path = Path(package.options["path"])
        files = tuple(store.put_file(path / name, name) for name in sorted(files_below(path)))
        license_ = own_license(package.options["license"], files)
        return Fetched(package=package, files=files, license=license_)

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """Compile and assemble each file by itself."""
        tree = workspace / "src"
        lay_out(fetched.files, store, tree)
        units, failures = _compile(fetched, store, workspace, toolchain, limits)
        for file in fetched.files:
            if file.name.endswith(_MODULES):
                found = _module(fetched, file, store, toolchain)
                if isinstance(found, TranslationUnit):
                    units.append(found)
                else:
                    failures.append(found)
        if not units:
            told = f"{failures[0].source_path}: {failures[0].reason}" if failures else ""
            raise SourceError(
                f"{fetched.package.name}: no unit ({told or 'no .c, .cpp, .ll or .bc file'})"
            )
        return build_result(fetched, units, failures)


def own_license(expression: str, files: Sequence[StoredFile]) -> License:
    """What the configuration says, else the licence texts at the top of the tree."""
    texts = tuple(
        file for file in files if "/" not in file.name and file.name.upper().startswith(_LICENSES)
    )
    if expression:
        return License(kind="spdx", expression=expression, origin="configuration", files=texts)
    return License(kind="none", origin=texts[0].name if texts else "", files=texts)


def _options(options: Mapping[str, Any]) -> _Options:
    wanted = convert_options(options, _Options, "path = directory")
    if not Path(wanted.path).is_dir():
        raise ConfigError("source.path", wanted.path, "a directory")
    return wanted


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    import hashlib

    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _compile(
    fetched: Fetched, store: Store, workspace: Path, toolchain: Toolchain, limits: BuildLimits
) -> tuple[list[TranslationUnit], list[BuildFailure]]:
    """Through the shim, without a compiler of the package's own."""
    sources = [file.name for file in fetched.files if file.name.endswith(_COMPILED)]
    if not sources:
        return [], []
    compiler = toolchain.need_c_compiler()
    environment = install_hook(
        workspace, seen_as=workspace, compiler=compiler, unit_s=limits.unit_s
    )
    tree = workspace / "src"
    flags = fetched.package.options["flags"]
    for name in sources:
        driver = "c++" if name.endswith(_CXX) else "cc"
        command = [sys.executable, "-IS", str(workspace / "shim" / "shim.py"), driver, *flags, name]
        subprocess.run(command, cwd=tree, env={**os.environ, **environment}, check=True)
    units, failures = collect(
        workspace / "drop",
        tree,
        store,
        compiler=compiler,
        build_system=LocalTree.name,
        before=files_below(tree),
    )
    return list(units), list(failures)


def _module(
    fetched: Fetched, file: StoredFile, store: Store, toolchain: Toolchain
) -> TranslationUnit | BuildFailure:
    """A unit of a file that is IR already."""
    data = store.get(file.sha256)
    writer, version = "", ""
    if file.name.endswith(".ll"):
        writer, version, data, reason = _assemble(data, toolchain)
        if reason:
            return BuildFailure(kind="compile", reason=reason, source_path=file.name)
    return TranslationUnit(
        module=store.put(data),
        size=len(data),
        language=fetched.package.language,
        source_path=file.name,
        source_sha256=file.sha256,
        compiler=f"{writer} {version}" if writer else "unknown",
        llvm_version=version,
        arguments=(),
        build_system=LocalTree.name,
        optimized=fetched.package.options["optimized"],
    )


def _assemble(text: bytes, toolchain: Toolchain) -> tuple[str, str, bytes, str]:
    """Writer, its version, bitcode, and why there is none."""
    name = "llvmlite" if toolchain.reads("llvmlite") else "llvm-as"
    tool = toolchain.need(name)
    command = [str(tool), "-", "-o", "-"]
    if name == "llvmlite":
        command = [sys.executable, "-c", _ASSEMBLER]
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    reason = done.stderr.decode("utf-8", "replace").strip().rpartition("RuntimeError: ")[2][-1000:]
    if done.returncode == 0:
        reason = ""
    return name, toolchain.llvm_version(name), done.stdout, reason


_ASSEMBLER = """
import sys
import llvmlite.binding as llvm
module = llvm.parse_assembly(sys.stdin.read())
module.name = ""
module.verify()
sys.stdout.buffer.write(module.as_bitcode())
"""
"""In a process of its own, since LLVM ends it on some input."""
