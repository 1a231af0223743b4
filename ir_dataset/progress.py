"""What a person sees while a corpus is made: a bar a stage on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bars", "Lines", "shown"]

LINE_EVERY_S = 30.0


class Bars:
    """One bar at a time, with the time left and the last input that ended."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("[red]{task.fields[failed]}[/red][dim]{task.fields[label]}[/dim]"),
            console=console,
        )
        self._failed = 0
        self._task = None

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, total: int, done: int) -> None:
        """A new bar."""
        if self._task is not None:
            self._progress.update(self._task, label="")
        self._failed = 0
        self._task = self._progress.add_task(name, total=total, completed=done, failed="", label="")

    def advance(self, label: str, failed: bool) -> None:
        """One step of the bar."""
        self._failed += failed
        note = f"{self._failed} failed " if self._failed else ""
        assert self._task is not None
        self._progress.update(self._task, advance=1, failed=note, label=label)


class Lines:
    """A line when a stage begins, each half minute, and when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name, self._total, self._done, self._reused, self._failed = "", 0, 0, 0, 0
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def stage(self, name: str, total: int, done: int) -> None:
        """The line of the stage before."""
        self._end()
        self._name, self._total, self._done, self._reused, self._failed = name, total, done, done, 0
        self._began = self._told = time.monotonic()

    def advance(self, label: str, failed: bool) -> None:
        """Perhaps a line."""
        self._done += 1
        self._failed += failed
        if time.monotonic() - self._told > LINE_EVERY_S:
            self._told = time.monotonic()
            self._line(f"  {self._left()}  {label}")

    def _left(self) -> str:
        ran = self._done - self._reused
        seconds = (time.monotonic() - self._began) / max(ran, 1) * (self._total - self._done)
        return f"about {seconds / 60:.0f} min left"

    def _end(self) -> None:
        if self._name:
            self._line("")
        self._name = ""

    def _line(self, rest: str) -> None:
        failed = f", {self._failed} failed" if self._failed else ""
        reused = f", {self._reused} from before" if self._reused else ""
        seconds = time.monotonic() - self._began
        self._console.print(
            f"{self._name}: {self._done}/{self._total}{reused}{failed}, {seconds:.0f} s{rest}",
            markup=False,
        )


@contextmanager
def shown(console: Console) -> Iterator[Bars | Lines]:
    """Bars on a terminal, lines elsewhere."""
    with Bars(console) if console.is_terminal else Lines(console) as progress:
        yield progress
