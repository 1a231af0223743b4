"""Compiles a list of sources in one sandbox, for packages that need no build system to be asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ir_dataset.extract import compile_all
from ir_dataset.extract.sandbox import Finished, Sandbox
from ir_dataset.records import BuildFailure, BuildResult, Fetched, TranslationUnit
from ir_dataset.sources.source import BuildLimits, build_result
from ir_dataset.store import Store
from rewriter.errors import SourceError

__all__ = ["OUTPUT", "Batch", "BatchUnit", "python_places", "sandbox_of"]

OUTPUT = "{output}"
"""Stands in commands for the file that the bitcode is to be written to."""


@dataclass(frozen=True, kw_only=True)
class BatchUnit:
    """A source, and the commands that may turn it into bitcode.

    Args:
        unit: the record as it will be, module and size still empty.
        attempts: commands, run in `src`; the first that succeeds counts.
        labels: what each attempt adds to the record's arguments, as many as attempts, or none.
    """

    unit: TranslationUnit
    attempts: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[str, ...], ...] = ()


def sandbox_of(workspace: Path, limits: BuildLimits, *shown: Path) -> Sandbox:
    """A sandbox with these limits, in which Python and the places given are to be seen."""
    return Sandbox(
        workspace=workspace,
        shown=(*python_places(), *shown),
        wall_s=limits.wall_s,
        memory_bytes=limits.memory_bytes,
        disk_bytes=limits.disk_bytes,
    )


def python_places() -> tuple[Path, ...]:
    """What the interpreter needs to run."""
    return tuple(
        sorted(
            {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent.parent}
        )
    )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Units that are compiled together.

    Args:
        rounds: how often units that failed are tried again after others succeeded.
        environment: for every command, beside the sandbox's own.
    """

    units: Sequence[BatchUnit]
    environment: Mapping[str, str]
    rounds: int = 1

    def run(
        self, fetched: Fetched, store: Store, sandbox: Sandbox, limits: BuildLimits
    ) -> BuildResult:
        """Compile, and store what was written.

        Raises:
            SourceError: nothing was.
        """
        finished = self._start(sandbox, limits)
        drop = sandbox.workspace / "drop"
        results = _results(drop / "results.jsonl", len(self.units))
        units, failures = [], []
        for index, given in enumerate(self.units):
            result = results.get(index)
            module = drop / f"{_key(index)}.bc"
            if result is None:
                failures.append(_failure(given, finished.limit or "build", "was not reached"))
            elif result["reason"] or module.is_symlink() or not module.is_file():
                reason = result["reason"] or "no bitcode was written"
                failures.append(_failure(given, result["kind"] or "compile", reason))
            else:
                units.append(_stored(given, result["attempt"], module, store))
        if not units:
            told = failures[0].reason if failures else "there was no source"
            raise SourceError(f"{fetched.package.name}: nothing compiled: {told}")
        if finished.limit:
            reason = f"stopped after {limits.wall_s:g} s" if finished.limit == "timeout" else "disk"
            failures.append(BuildFailure(kind=finished.limit, reason=reason))
        complete = not finished.limit and finished.status == 0
        log = store.put(finished.tail.encode())
        return build_result(fetched, units, failures, complete=complete, log=log)

    def _start(self, sandbox: Sandbox, limits: BuildLimits) -> Finished:
        (sandbox.workspace / "drop").mkdir(exist_ok=True)
        seen = sandbox.seen_as
        plan = {
            "units": [
                {"key": _key(index), "attempts": unit.attempts}
                for index, unit in enumerate(self.units)
            ],
            "jobs": limits.jobs,
            "rounds": self.rounds,
            "unit_s": limits.unit_s,
            "drop": str(seen / "drop"),
            "results": str(seen / "drop" / "results.jsonl"),
        }
        (sandbox.workspace / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        script = Path(compile_all.__file__).read_text(encoding="utf-8")
        (sandbox.workspace / "compile_all.py").write_text(script, encoding="utf-8")
        command = [sys.executable, "-IS", str(seen / "compile_all.py"), str(seen / "plan.json")]
        return sandbox.run(command, {"PATH": "/usr/local/bin:/usr/bin:/bin", **self.environment})


def _key(index: int) -> str:
    return f"{index:06d}"


def _results(path: Path, count: int) -> dict[int, dict]:
    """By the unit's number; a line that was cut off by the end is left out."""
    if path.is_symlink() or not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        index = int(result["key"])
        if index < count:
            found[index] = result
    return found


def _failure(given: BatchUnit, kind: str, reason: str) -> BuildFailure:
    return BuildFailure(kind=kind, reason=reason, source_path=given.unit.source_path)


def _stored(given: BatchUnit, attempt: int, module: Path, store: Store) -> TranslationUnit:
    stored = store.put_file(module)
    extra = given.labels[attempt] if given.labels else ()
    values = {name: getattr(given.unit, name) for name in given.unit.__struct_fields__}
    values |= {
        "module": stored.sha256,
        "size": stored.size,
        "arguments": (*given.unit.arguments, *extra),
    }
    return TranslationUnit(**values)
