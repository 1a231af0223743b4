"""A project that is configured here already: every entry of its compile_commands.json.

CMake writes the file with `-DCMAKE_EXPORT_COMPILE_COMMANDS=ON`, other build systems through Bear. Only
the compiler's front end runs; headers are read where they are, so the tree has to stay as it was.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from ir_dataset.extract.collect import collect, files_below
from ir_dataset.extract.hook import install_hook
from ir_dataset.records import BuildFailure, BuildResult, Fetched, Package, digest
from ir_dataset.sources.local_tree import own_license, sha256_of
from ir_dataset.sources.source import BuildLimits, build_result, convert_options
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

__all__ = ["CompileCommands"]

_LICENSES = ("LICENSE*", "LICENCE*", "COPYING*")


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    root: str = ""
    name: str = ""
    license: str = ""
    project: str = ""


class _Entry(msgspec.Struct, frozen=True):
    directory: str
    file: str
    command: str = ""
    arguments: tuple[str, ...] = ()


class CompileCommands:
    """Options.

    `path`: the compile_commands.json. `root` (its directory's): the project's tree; sources outside of
    it are left out. `license`: one SPDX expression; else the LICENSE files of `root` are looked at.
    `name`, `project`: the name of `root`.
    """

    name: ClassVar[str] = "compile-commands"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("c", "c++")

    def missing(self, toolchain: Toolchain) -> str | None:
        """Needs a C compiler of the pinned LLVM."""
        return toolchain.why_no_c_compiler()

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """One package; its version is the hash of the entries and their sources.

        Raises:
            ConfigError: an option is unknown or of a wrong type, or the file is no such database.
        """
        wanted = _options(options)
        path = Path(wanted.path)
        entries = _entries(path)
        root = Path(wanted.root or path.parent).resolve()
        sources = [Path(entry.directory, entry.file) for entry in entries]
        content = [(str(one), sha256_of(one)) for one in sources if one.is_file()]
        name = wanted.name or root.name
        return [
            Package(
                source=self.name,
                name=name,
                version=digest(content, sha256_of(path))[:16],
                language="c",
                project=wanted.project or name,
                options={**msgspec.to_builtins(wanted), "root": str(root)},
            )
        ]

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """The database and the licence texts."""
        root = Path(package.options["root"])
        texts = sorted(
            {path for pattern in _LICENSES for path in root.glob(pattern) if path.is_file()}
        )
        files = [store.put_file(path) for path in texts]
        license_ = own_license(package.options["license"], files)
        database = store.put_file(Path(package.options["path"]), "compile_commands.json")
        return Fetched(package=package, files=(database, *files), license=license_)

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """Every entry through the shim, in the entry's own directory."""
        compiler = toolchain.need_c_compiler()
        root = Path(fetched.package.options["root"])
        environment = install_hook(
            workspace, seen_as=workspace, compiler=compiler, unit_s=limits.unit_s, root=root
        )
        shim = [sys.executable, "-IS", str(workspace / "shim" / "shim.py")]

        def extract(entry: _Entry) -> BuildFailure | None:
            arguments = list(entry.arguments) or shlex.split(entry.command)
            done = subprocess.run(
                [*shim, os.path.basename(arguments[0]), *arguments[1:]],
                cwd=entry.directory,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                return None
            return BuildFailure(kind="tool", reason=done.stderr[-500:], source_path=entry.file)

        path = workspace / "compile_commands.json"
        path.write_bytes(store.get(fetched.files[0].sha256))
        with ThreadPoolExecutor(limits.jobs) as pool:
            faults = [fault for fault in pool.map(extract, _entries(path)) if fault]
        units, failures = collect(
            workspace / "drop",
            root,
            store,
            compiler=compiler,
            build_system=self.name,
            before=files_below(root),
        )
        if not units:
            told = (*failures, *faults)
            why = told[0].reason if told else f"no entry of a source below {root}"
            raise SourceError(f"{fetched.package.name}: no unit: {why}")
        return build_result(fetched, units, (*failures, *faults))


def _options(options: Mapping[str, Any]) -> _Options:
    wanted = convert_options(options, _Options, "path = file")
    if not Path(wanted.path).is_file():
        raise ConfigError("source.path", wanted.path, "a compile_commands.json")
    return wanted


def _entries(path: Path) -> list[_Entry]:
    try:
        entries = msgspec.convert(json.loads(path.read_bytes()), list[_Entry])
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError("source.path", str(path), f"a compilation database ({error})") from error
    empty = [entry.file for entry in entries if not entry.arguments and not entry.command]
    if empty:
        raise ConfigError("source.path", str(path), f"entries with a command ({empty[0]} has none)")
    return entries
