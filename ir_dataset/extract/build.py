"""A package's own build, run in the sandbox with the shim in the compilers' place."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ir_dataset.extract.batch import sandbox_of
from ir_dataset.extract.collect import collect, files_below
from ir_dataset.extract.embed import unpack_embedded
from ir_dataset.extract.hook import install_hook
from ir_dataset.extract.sandbox import Finished, Sandbox
from ir_dataset.records import BuildFailure, BuildResult, Fetched, TranslationUnit
from ir_dataset.sources.source import BuildLimits, build_result
from ir_dataset.store import Store
from ir_dataset.toolchain import CCompiler
from rewriter.errors import SourceError

__all__ = ["HookedBuild", "result_of", "why"]


@dataclass(frozen=True, kw_only=True)
class HookedBuild:
    """A workspace whose `src` holds, or will hold, a package's sources."""

    sandbox: Sandbox
    compiler: CCompiler
    environment: Mapping[str, str]
    embed: bool

    @staticmethod
    def prepare(
        workspace: Path,
        compiler: CCompiler,
        limits: BuildLimits,
        *,
        aliases: Sequence[tuple[str, str]] = (),
        embed: bool = False,
    ) -> HookedBuild:
        """Set up the sandbox and the shim, with the arguments of `install_hook`."""
        binary = Path(compiler.c[0]).resolve().parent
        tools = binary.parent if compiler.kind == "clang" else binary
        sandbox = sandbox_of(workspace, limits, tools)
        environment = install_hook(
            workspace,
            seen_as=sandbox.seen_as,
            compiler=compiler,
            unit_s=limits.unit_s,
            python=_python(),
            aliases=aliases,
            embed=embed,
        )
        return HookedBuild(sandbox=sandbox, compiler=compiler, environment=environment, embed=embed)

    def run(
        self,
        fetched: Fetched,
        store: Store,
        command: Sequence[str],
        build_system: str,
        environment: Mapping[str, str],
    ) -> BuildResult:
        """Run the build and keep what it gave, ended or not.

        Raises:
            SourceError: it failed before there was any bitcode.
        """
        workspace = self.sandbox.workspace
        before = files_below(workspace / "src")
        finished = self.sandbox.run(command, {**self.environment, **environment})
        if self.embed:
            unpack_embedded(workspace / "drop")
        units, failures = collect(
            workspace / "drop",
            workspace / "src",
            store,
            compiler=self.compiler,
            build_system=build_system,
            before=before,
        )
        return result_of(fetched, store, finished, units, failures)


def result_of(
    fetched: Fetched,
    store: Store,
    finished: Finished,
    units: Sequence[TranslationUnit],
    failures: Sequence[BuildFailure] = (),
) -> BuildResult:
    """What a build that ended this way left; units and failures are sorted.

    Raises:
        SourceError: it failed before there was any bitcode.
    """
    complete = finished.status == 0 and not finished.limit
    if not units and not complete:
        raise SourceError(f"{fetched.package.name}: {why(finished)}: {finished.tail[-1500:]}")
    if not complete:
        stopped = BuildFailure(kind=finished.limit or "build", reason=why(finished))
        failures = (stopped, *failures)
    log = store.put(finished.tail.encode())
    return build_result(fetched, units, failures, complete=complete, log=log)


def why(finished: Finished) -> str:
    """How a command ended, in words that do not change from run to run."""
    if finished.limit:
        return f"stopped at its {finished.limit} limit"
    return f"the build ended with status {finished.status}"


def _python() -> str:
    """An interpreter for the shim: the system's starts fastest."""
    system = "/usr/bin/python3"
    return system if os.access(system, os.X_OK) else sys.executable
