"""What goes where: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rewriter.errors import RewriterError, VerificationError

__all__ = ["FAILED", "INTERRUPTED", "INVALID", "OK", "UNEXPECTED", "guarded", "out", "stages", "write_json"]

OK, FAILED, INVALID, UNEXPECTED, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: done; verification failed; bad usage or input; a defect of ours; interrupted."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def write_json(value: Any) -> None:
    """Exactly one JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1, default=str))


@contextmanager
def stages(quiet: bool = False) -> Iterator[Any]:
    """A callable that names the stage at work; shown on stderr with a spinner and a clock."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda stage: progress.update(task, description=stage)


@contextmanager
def guarded(debug: bool) -> Iterator[None]:
    """Turn errors into one line and an exit code; `debug` lets them through."""
    _quiet_libraries()
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except VerificationError as error:
        if debug:
            raise
        _complain(str(error))
        raise typer.Exit(FAILED) from None
    except RewriterError as error:
        if debug:
            raise
        _complain(str(error))
        raise typer.Exit(INVALID) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:  # the last frontier: a defect of ours, said in one line
        if debug:
            raise
        first = (str(error).splitlines() or [""])[0]
        _complain(f"unexpected {type(error).__name__}: {first} (run with --debug for the traceback)")
        raise typer.Exit(UNEXPECTED) from None


def _complain(message: str) -> None:
    err.print(f"error: {message}", style="red", markup=False)


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries below would mix with ours."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    logging.getLogger("rewriter").addHandler(logging.NullHandler())
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
