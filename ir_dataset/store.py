"""Where everything lies: objects by the hash of their bytes, and what each task gave, in SQLite.

Objects are written to a temporary name and renamed, and a task is recorded after its objects are
there. So the store is whole at every moment, and a killed run loses no more than the task it was at.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ir_dataset.records import StoredFile
from rewriter.errors import ArtifactError, ConfigError

__all__ = ["Store", "TaskRow"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS task (
    key TEXT PRIMARY KEY, stage TEXT NOT NULL, label TEXT NOT NULL, status TEXT NOT NULL,
    output TEXT NOT NULL, error_kind TEXT NOT NULL, error TEXT NOT NULL,
    wall_s REAL NOT NULL, finished_utc REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_stage ON task (stage, status);
"""


@dataclass(frozen=True)
class TaskRow:
    """What a task gave: the hash of its output, or why there is none."""

    key: str
    stage: str
    label: str
    status: str
    """`done` or `failed`."""
    output: str = ""
    error_kind: str = ""
    error: str = ""
    wall_s: float = 0.0


class Store:
    """Objects and task states under one directory.

    Any number of processes may put and get objects; one process at a time records tasks.

    Raises:
        ConfigError: `root` is a file, or cannot be written to.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self.objects = self.root / "cas"
        self.scratch = self.root / "tmp"
        try:
            for place in (self.objects, self.scratch):
                place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("store", str(root), f"a directory to write to ({error})") from error
        self._tasks: sqlite3.Connection | None = None

    def path(self, sha: str) -> Path:
        """Where an object lies, whether it is there or not."""
        return self.objects / sha[:2] / sha

    def put(self, data: bytes) -> str:
        """Store bytes; returns their sha256."""
        sha = hashlib.sha256(data).hexdigest()
        if not self.path(sha).exists():
            with self._written(sha) as place:
                place.write_bytes(data)
        return sha

    def put_file(self, source: Path, name: str | None = None) -> StoredFile:
        """Store a file's bytes; `name` is what the record calls it."""
        with source.open("rb") as stream:
            sha = hashlib.file_digest(stream, "sha256").hexdigest()
        if not self.path(sha).exists():
            with self._written(sha) as place:
                shutil.copyfile(source, place)
        return StoredFile(name=name or source.name, sha256=sha, size=source.stat().st_size)

    def get(self, sha: str) -> bytes:
        """An object's bytes.

        Raises:
            ArtifactError: it is not there, or its bytes no longer have this hash.
        """
        try:
            data = self.path(sha).read_bytes()
        except FileNotFoundError as error:
            raise ArtifactError(f"object {sha} is not in the store {self.root}") from error
        if hashlib.sha256(data).hexdigest() != sha:
            raise ArtifactError(f"object {sha} in the store {self.root} is damaged: remove it")
        return data

    def has(self, sha: str) -> bool:
        """Whether an object is there."""
        return self.path(sha).exists()

    @contextlib.contextmanager
    def workspace(self, key: str):  # noqa: ANN201
        """A directory of a task's own, always at the same place, empty at first and gone afterwards.

        The place is the same each time because compilers write it into what they give.
        """
        place = self.scratch / key[:16]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    @contextlib.contextmanager
    def _written(self, sha: str):  # noqa: ANN202
        target = self.path(sha)
        target.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.scratch, prefix="put-")
        os.close(handle)
        place = Path(name)
        try:
            yield place
            place.chmod(0o644)
            place.replace(target)
        finally:
            place.unlink(missing_ok=True)

    # --- tasks -------------------------------------------------------------------------------

    def _connection(self) -> sqlite3.Connection:
        if self._tasks is None:
            self._tasks = sqlite3.connect(self.root / "tasks.sqlite", timeout=60)
            self._tasks.execute("PRAGMA journal_mode=WAL")
            self._tasks.executescript(_SCHEMA)
        return self._tasks

    def task(self, key: str) -> TaskRow | None:
        """What the task with this key gave, if it ran to its end and its output is still there."""
        row = (
            self._connection()
            .execute(
                "SELECT key, stage, label, status, output, error_kind, error, wall_s FROM task"
                " WHERE key = ?",
                (key,),
            )
            .fetchone()
        )
        if row is None:
            return None
        found = TaskRow(*row)
        return found if found.status == "failed" or self.has(found.output) else None

    def record(self, row: TaskRow) -> None:
        """Keep what a task gave, over what it gave before."""
        connection = self._connection()
        with connection:
            connection.execute(
                "INSERT OR REPLACE INTO task VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.key,
                    row.stage,
                    row.label,
                    row.status,
                    row.output,
                    row.error_kind,
                    row.error,
                    row.wall_s,
                    time.time(),
                ),
            )

    def counts(self) -> dict[str, Counter[str]]:
        """How many tasks are done and failed, by stage."""
        found: dict[str, Counter[str]] = {}
        query = "SELECT stage, status, count(*) FROM task GROUP BY stage, status"
        for stage, status, number in self._connection().execute(query):
            found.setdefault(stage, Counter())[status] = number
        return found

    def failures(self, stage: str | None = None) -> list[TaskRow]:
        """Tasks that failed, in the order of stage and label."""
        query = (
            "SELECT key, stage, label, status, output, error_kind, error, wall_s FROM task"
            " WHERE status = 'failed' AND (? IS NULL OR stage = ?) ORDER BY stage, label"
        )
        return [TaskRow(*row) for row in self._connection().execute(query, (stage, stage))]

    def forget_failures(self) -> int:
        """Let failed tasks run again; returns how many there were."""
        connection = self._connection()
        with connection:
            return connection.execute("DELETE FROM task WHERE status = 'failed'").rowcount

    def close(self) -> None:
        """Close the task table; the store can be used again afterwards."""
        if self._tasks is not None:
            self._tasks.close()
            self._tasks = None
