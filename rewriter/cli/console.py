"""What goes where: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rewriter.errors import RewriterError, VerificationError

__all__ = ["err", "guarded", "out", "stages", "write_json"]

FAILED, INVALID, UNEXPECTED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: verification failed; bad usage or input; a defect of ours; interrupted."""
WORTH_A_LINE = 2.0
"""Seconds a stage has to take to be mentioned."""

out = Console(emoji=False, highlight=False, soft_wrap=True)
err = Console(stderr=True, emoji=False, highlight=False, soft_wrap=True)


def write_json(value: Any) -> None:
    """Exactly one JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1, default=str))


OnStage = Callable[..., None]
"""Called with the name of the stage at work and, where it is known, the share that is done."""


@contextmanager
def stages() -> Iterator[OnStage]:
    """A callable that names the stage at work, for stderr: a spinner and a clock on a terminal.

    Elsewhere each stage that took over two seconds leaves a line. What libraries below would show of
    their own is left out.
    """
    _quiet_libraries()
    if not err.is_terminal:
        with _timed_lines() as on_stage:
            yield on_stage
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def on_stage(stage: str, done: float | None = None) -> None:
            share = "" if done is None else f" {done:.0%}"
            progress.update(task, description=f"{stage}{share}")

        yield on_stage


@contextmanager
def _timed_lines() -> Iterator[OnStage]:
    current, started = "", time.perf_counter()

    def on_stage(stage: str, _done: float | None = None) -> None:
        nonlocal current, started
        if stage == current:
            return
        seconds = time.perf_counter() - started
        if current and seconds > WORTH_A_LINE:
            err.print(f"{current}: {seconds:.1f} s", markup=False)
        current, started = stage, time.perf_counter()

    yield on_stage
    on_stage("")


@contextmanager
def guarded(debug: bool) -> Iterator[None]:
    """Turn errors into one line and an exit code; `debug` lets them through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("rewriter").addHandler(logging.NullHandler())
        try:
            yield
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:  # the last frontier: whatever happened is said in one line
            if debug:
                raise
            raise typer.Exit(_complain(error)) from None


def _complain(error: Exception) -> int:
    """Say on stderr what went wrong; the exit code for it."""
    if isinstance(error, RewriterError):
        err.print(f"error: {error}", style="red", markup=False)
        return FAILED if isinstance(error, VerificationError) else INVALID
    first = (str(error).splitlines() or [""])[0]
    hint = "run with --debug for the traceback"
    err.print(
        f"error: unexpected {type(error).__name__}: {first} ({hint})", style="red", markup=False
    )
    return UNEXPECTED


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries below would mix with ours."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
