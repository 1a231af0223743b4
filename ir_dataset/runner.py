"""Runs a stage over its inputs: finds what ran before, runs the rest, keeps what each gave."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ir_dataset.executor import Executor, Outcome, Work
from ir_dataset.records import Record, decode, digest, encode
from ir_dataset.stages import STAGES
from ir_dataset.store import Store, TaskRow
from rewriter.errors import SourceError

__all__ = ["Progress", "Runner", "Silent", "StageSummary", "Task"]

log = logging.getLogger(__name__)

OPTIONAL = frozenset({"fetch", "build"})
"""Stages of which a run may leave tasks for another: what follows works with what is there."""
TRANSIENT = frozenset({"disk", "node"})
"""Failures that say nothing of the input: told, but not kept, so that the next run tries again."""


@dataclass(frozen=True)
class Task:
    """One input of a stage, and what people call it."""

    label: str
    input: Record


@dataclass
class StageSummary:
    """What a stage did in this run."""

    stage: str
    total: int = 0
    reused: int = 0
    failed: int = 0
    wall_s: float = 0.0
    task_s: float = 0.0
    """Sum of the tasks' own wall times, those of earlier runs included."""


class Progress(Protocol):
    """What is told of a stage while it runs."""

    def stage(self, name: str, total: int, done: int) -> None:
        """A stage begins, with this much of it done before."""
        ...

    def advance(self, label: str, failed: bool) -> None:
        """One more of its tasks ended."""
        ...


class Silent:
    """Progress that nobody sees."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Nothing."""

    def advance(self, label: str, failed: bool) -> None:
        """Nothing."""


@dataclass
class Runner:
    """Stages over one store.

    Args:
        store: where objects and task states lie.
        executor: where tasks run.
        progress: who is told.
        retry_failed: run failed tasks again instead of taking the failure as the answer.
        stop: asked before a fetch or a build begins: True leaves the rest for another run.
    """

    store: Store
    executor: Executor
    progress: Progress = field(default_factory=Silent)
    retry_failed: bool = False
    stop: Callable[[], bool] = lambda: False
    summaries: list[StageSummary] = field(default_factory=list)

    def map(self, stage: str, tasks: Sequence[Task]) -> list[str | None]:
        """The hash of each task's output, in order; None where it failed or was left."""
        rows = self._rows(stage, tasks)
        return [row.output if row and row.status == "done" else None for row in rows]

    def _rows(
        self, stage: str, tasks: Sequence[Task], *, again: bool = False
    ) -> list[TaskRow | None]:
        started = time.perf_counter()
        definition = STAGES[stage]
        payloads = [encode(task.input) for task in tasks]
        keys = [digest(stage, definition.version, payload.decode()) for payload in payloads]
        found = {key: None if again else self._before(key) for key in dict.fromkeys(keys)}
        missing = {key: index for index, key in enumerate(keys) if found[key] is None}
        summary = StageSummary(stage, len(found), len(found) - len(missing))
        self.progress.stage(stage, len(found), summary.reused)

        order = sorted(missing.values())

        def on_done(position: int, outcome: Outcome) -> None:
            index = order[position]
            row = _row(keys[index], stage, tasks[index].label, outcome)
            if outcome.error_kind not in TRANSIENT:
                self.store.record(row)
            found[row.key] = row
            if row.status == "failed":
                log.warning("%s %s: %s: %s", stage, row.label, row.error_kind, row.error)
            self.progress.advance(row.label, row.status == "failed")

        if order:
            stop = self.stop if stage in OPTIONAL else _never
            left = [payloads[index] for index in order]
            self.executor.run(
                Work(definition.perform, self.store.root, left, definition.timeout_s, stop), on_done
            )
        rows = [row for row in found.values() if row is not None]
        summary.failed = sum(row.status == "failed" for row in rows)
        summary.task_s = sum(row.wall_s for row in rows)
        summary.wall_s = time.perf_counter() - started
        self.summaries.append(summary)
        return [found[key] for key in keys]

    def records(self, stage: str, tasks: Sequence[Task], *, again: bool = False) -> list[Any]:
        """As `map`, decoded; None where a task failed. `again` runs also what ran before."""
        kind = STAGES[stage].output
        rows = self._rows(stage, tasks, again=again) if tasks else []
        return [
            decode(self.store.get(row.output), kind) if row and row.status == "done" else None
            for row in rows
        ]

    def one(self, stage: str, task: Task) -> Any:
        """A stage with a single task.

        Raises:
            SourceError: it failed.
        """
        (row,) = self._rows(stage, [task])
        if row is None or row.status == "failed":
            why = f"{row.error_kind}: {row.error}" if row else "not run"
            raise SourceError(f"stage {stage} failed: {why}")
        return decode(self.store.get(row.output), STAGES[stage].output)

    def _before(self, key: str) -> TaskRow | None:
        row = self.store.task(key)
        return None if row and row.status == "failed" and self.retry_failed else row


def _never() -> bool:
    return False


def _row(key: str, stage: str, label: str, outcome: Outcome) -> TaskRow:
    status = "failed" if outcome.error_kind else "done"
    return TaskRow(
        key, stage, label, status, outcome.output, outcome.error_kind, outcome.error, outcome.wall_s
    )
