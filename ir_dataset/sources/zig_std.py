"""Zig's standard library from the wheel: one module for each of its files.

A Zig file gives code only for what is called with types that are known. So each file is compiled with
its own tests, which do that, and with a reference to each of its public declarations; the library's
other tests are left out, and the test runner is a plain loop, so that little is in every module. Where
the tests do not compile (the wheel has some of their helpers empty) the declarations alone are.

`-femit-llvm-bc` is optimised; `--verbose-llvm-bc` is what the front end gave.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import msgspec

from ir_dataset.extract.batch import OUTPUT, Batch, BatchUnit, sandbox_of
from ir_dataset.records import BuildResult, Fetched, License, Package, TranslationUnit
from ir_dataset.sources.source import BuildLimits, convert_options, lay_out
from ir_dataset.store import Store
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ConfigError, SourceError

__all__ = ["ZigStd"]

_UNNAMED_TEST = re.compile(r"^([ \t]*)test \{", re.MULTILINE)
_TARGET = "x86_64-linux"

_RUNNER = """\
const std = @import("std");
const builtin = @import("builtin");
pub const panic = std.debug.no_panic;
pub const std_options: std.Options = .{ .enable_segfault_handler = false };
pub const std_options_debug_threaded_io: ?*std.Io.Threaded = null;
pub const std_options_debug_io: std.Io = std.Io.failing;
pub fn main() u8 {
    return run_tests();
}
export fn run_tests() u8 {
    for (builtin.test_functions) |one| one.func() catch return 1;
    return 0;
}
"""
"""Does not print, and panics without a trace: the default one adds 2,000 functions to each module."""

_FLAGS = (
    *("-target", _TARGET, "-mcpu=baseline", "-fllvm", "-fstrip", "-fno-ubsan-rt"),
    *("-fno-compiler-rt", "-fno-emit-bin", "--test-no-exec", "--test-runner", "runner.zig"),
)
_MODES = ("Debug", "ReleaseSafe", "ReleaseFast", "ReleaseSmall")


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    files: tuple[str, ...] = ()
    limit: int = 0
    mode: str = "ReleaseSafe"


class ZigStd:
    """Options, all with defaults.

    `files` (all): files or directories of `std`, such as `["sort.zig", "compress"]`. `limit` (0, none):
    at most this many files, the first by name. `mode` (`ReleaseSafe`): Zig's build mode, which decides
    what checks the front end writes.
    """

    name: ClassVar[str] = "zig-std"
    version: ClassVar[str] = "1"
    languages: ClassVar[tuple[str, ...]] = ("zig",)

    def missing(self, toolchain: Toolchain) -> str | None:
        """Needs Zig of the pinned LLVM, with its library beside it as in the wheel."""
        if told := toolchain.why_not("zig"):
            return told
        zig = toolchain.need("zig")
        if not _library(zig).is_dir():
            return f"there is no library beside {zig}: pip install 'rewriter[zig]'"
        return None

    def discover(self, options: Mapping[str, Any]) -> Sequence[Package]:
        """One package, the library of the Zig that is installed.

        Raises:
            ConfigError: an option is unknown or of a wrong type, or the library has no such file.
        """
        wanted = convert_options(options, _Options, "files, limit, mode")
        if wanted.mode not in _MODES:
            raise ConfigError("source.mode", wanted.mode, f"one of {', '.join(_MODES)}")
        zig = Toolchain.find().need("zig")
        for name in wanted.files:
            if not (_library(zig) / "std" / name).exists():
                raise ConfigError("source.files", name, "files and directories of lib/std")
        return [
            Package(
                source=self.name,
                name="zig-std",
                version=_version(zig),
                language="zig",
                project="zig",
                url="https://ziglang.org",
                options=msgspec.to_builtins(wanted),
            )
        ]

    def fetch(self, package: Package, store: Store, workspace: Path) -> Fetched:
        """The library as one archive, and its licence."""
        zig = Toolchain.find().need("zig")
        place = _library(zig)
        files = sorted(path for path in (place / "std").rglob("*") if path.is_file())
        stored = tuple(store.put_file(path, path.relative_to(place).as_posix()) for path in files)
        text = next((one for one in _license_places(zig) if one.is_file()), None)
        if text is None:
            raise SourceError(f"zig-std: no LICENSE beside {zig}")
        notice = store.put_file(text, "LICENSE")
        license_ = License(kind="spdx", expression="MIT", origin="LICENSE", files=(notice,))
        return Fetched(package=package, files=stored, license=license_)

    def build(
        self,
        fetched: Fetched,
        store: Store,
        workspace: Path,
        *,
        toolchain: Toolchain,
        limits: BuildLimits,
    ) -> BuildResult:
        """Compile each file with its tests."""
        zig = toolchain.need("zig")
        sandbox = sandbox_of(workspace, limits, zig.parent)
        hashes = _lay_out(fetched, store, workspace / "src", _library(zig))
        options = msgspec.convert(fetched.package.options, _Options)
        version = toolchain.llvm_version("zig")
        units = [
            _unit(path, hashes[path], str(zig), fetched.package.version, version, options.mode)
            for path in list(_wanted(hashes, options))
        ]
        cache = str(sandbox.seen_as / "home" / "zig")
        environment = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        return Batch(units=units, environment=environment).run(fetched, store, sandbox, limits)


def _library(zig: Path) -> Path:
    return zig.parent / "lib"


def _license_places(zig: Path) -> Iterator[Path]:
    yield zig.parent / "LICENSE"
    yield from sorted(zig.parent.parent.glob("ziglang-*.dist-info/**/LICENSE*"))


def _version(zig: Path) -> str:
    import subprocess

    done = subprocess.run([str(zig), "version"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SourceError(f"{zig} version: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


def _wanted(hashes: Mapping[str, str], options: _Options) -> list[str]:
    """Paths below `std`, sorted."""
    names = sorted(path for path in hashes if path.endswith(".zig") and path != "std.zig")
    if options.files:
        names = [
            path
            for path in names
            if any(path == one or path.startswith(one.rstrip("/") + "/") for one in options.files)
        ]
    return names[: options.limit or None]


def _lay_out(fetched: Fetched, store: Store, tree: Path, library: Path) -> dict[str, str]:
    """Write the library to be compiled to `lib`, the rest of Zig's beside it; hashes by path in `std`.

    Tests without a name cannot be filtered out, and reach all of the library: they get one.
    """
    tree.mkdir()
    (tree / "runner.zig").write_text(_RUNNER)
    lib = tree / "lib"
    lib.mkdir()
    for beside in library.iterdir():
        if beside.name != "std":
            (lib / beside.name).symlink_to(beside)
    lay_out(fetched.files, store, lib)
    hashes = {}
    for file in fetched.files:
        place = lib / file.name
        hashes[file.name.removeprefix("std/")] = file.sha256
        if place.suffix == ".zig":
            place.write_text(_named(place.read_text(encoding="utf-8")), encoding="utf-8")
    entry = lib / "std" / "std.zig"
    names = [path for path in sorted(hashes) if path.endswith(".zig") and path != "std.zig"]
    entries = [
        f'test "@all:{name}:" {{ testing.refAllDecls(@import("{name}")); }}\n'
        f'test "@one:{name}:" {{ _ = @import("{name}"); }}\n'
        for name in names
    ]
    entry.write_text(entry.read_text(encoding="utf-8") + "".join(entries), encoding="utf-8")
    return hashes


def _named(text: str) -> str:
    numbers = iter(range(len(text)))
    return _UNNAMED_TEST.sub(lambda found: f'{found[1]}test "@unnamed{next(numbers)}" {{', text)


def _unit(path: str, sha: str, zig: str, release: str, version: str, mode: str) -> BatchUnit:
    dotted = PurePosixPath(path).with_suffix("").as_posix().replace("/", ".")
    tests = ("--test-filter", f"{dotted}.test", "--test-filter", f"{dotted}.decltest")
    every, one = (("--test-filter", f"@{kind}:{path}:") for kind in ("all", "one"))
    filters = ((*every, *tests), (*one, *tests), every)
    start = ("test-obj", "lib/std/std.zig", "--zig-lib-dir", "lib", *_FLAGS, "-O", mode)
    unit = TranslationUnit(
        module="",
        size=0,
        language="zig",
        source_path=f"std/{path}",
        source_sha256=sha,
        compiler=f"zig {release}",
        llvm_version=version,
        arguments=start,
        build_system="zig",
        opt_level_requested=f"-O{mode}",
    )
    attempts = tuple((zig, *start, *chosen, "--verbose-llvm-bc=" + OUTPUT) for chosen in filters)
    return BatchUnit(unit=unit, attempts=attempts, labels=filters)
