"""The stages of `optimize` before any pass: load, capture, raise, derive, and what of it is sound."""

from __future__ import annotations

import dataclasses
import gc
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewriter.capture.causal_lm import capture_causal_lm, is_causal_lm
from rewriter.capture.module import capture
from rewriter.capture.sources import load_model
from rewriter.decoding.derive import derive
from rewriter.engine.miss import Miss
from rewriter.errors import VerificationError
from rewriter.program import Program
from rewriter.raising import raise_program
from rewriter.report.report import Report, Step
from rewriter.verify.baseline import Baseline
from rewriter.verify.own_forward import check_capture
from rewriter.verify.verification import Verification

__all__ = [
    "Clock",
    "Examples",
    "Model",
    "OnStage",
    "Prepared",
    "capture_model",
    "load_given",
    "new_report",
    "prepare",
    "sound_base",
    "undisturbed",
]

log = logging.getLogger("rewriter")

Model = nn.Module | str | Path
Examples = tuple[Any, ...] | Mapping[str, Any] | None
OnStage = Callable[[str], None]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the user's random numbers as they were, and the garbage collector little to do.

    A process with torch and a model has millions of objects that live on; the collector would look
    at all of them again and again while graphs grow.
    """
    freeze = gc.get_freeze_count() == 0
    if freeze:
        gc.freeze()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if freeze:
            gc.unfreeze()


class Clock:
    """Tells of each stage as it starts, and keeps by name how long it took in `seconds`."""

    def __init__(
        self, on_stage: OnStage | None = None, seconds: dict[str, float] | None = None
    ) -> None:
        self.seconds: dict[str, float] = {} if seconds is None else seconds
        self.on_stage = on_stage

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block under this name."""
        log.info("%s", stage)
        if self.on_stage is not None:
            self.on_stage(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


@dataclass(frozen=True)
class Prepared:
    """A model brought to the point where passes run.

    Attributes:
        model: as it was given or loaded. directory: where it was read from, if it was.
        captured, raised: the program before and after raising. decoding: None where not derived.
    """

    model: nn.Module
    directory: Path | None
    captured: Program
    raised: Program
    decoding: Program | None

    @property
    def base(self) -> Program:
        """The furthest stage."""
        return self.raised if self.decoding is None else self.decoding


def new_report(model: Model) -> Report:
    """An empty report that says of which model and on which versions."""
    import transformers

    import rewriter

    name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    versions = {
        "rewriter": rewriter.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return Report(name, versions=versions)


def prepare(model: Model, example_inputs: Examples, report: Report, clock: Clock) -> Prepared:
    """Load, capture, raise and derive, recording what was and was not possible.

    Raises:
        ModelError, CaptureError, ConfigError: as of `optimize`.
    """
    with clock("load"):
        loaded, directory = load_given(model)
    with clock("capture"):
        captured = capture_model(loaded, example_inputs)
    report.seconds["export"] = captured.meta.get("export_seconds", 0.0)
    report.baked = captured.baked
    with clock("raise"):
        raised = captured.clone()
        outcome = raise_program(raised)
    report.coverage, report.misses = outcome.coverage, [*report.misses, *outcome.misses]
    report.steps.append(Step("raise", captured.code, raised.code))
    with clock("derive"):
        decoding = _derived(raised, report)
    return Prepared(loaded, directory, captured, raised, decoding)


def load_given(model: Model) -> tuple[nn.Module, Path | None]:
    """The module, and the directory it came from."""
    if isinstance(model, nn.Module):
        return model, None
    directory = Path(model)
    return load_model(str(model)), directory if directory.is_dir() else None


def capture_model(model: nn.Module, example_inputs: Examples) -> Program:
    """The captured program; a language model needs no example inputs."""
    if example_inputs is None and is_causal_lm(model):
        return capture_causal_lm(model)  # pyright: ignore[reportArgumentType]
    return capture(model, example_inputs)


def _derived(raised: Program, report: Report) -> Program | None:
    """The decoding program, or None with the reason in the report."""
    if raised.meta.get("kind") != "causal_lm":
        report.decoding = "not a causal language model"
        return None
    decoding = derive(raised)
    if isinstance(decoding, Miss):
        report.misses.append(decoding)
        report.decoding = f"not derived: {decoding.reason}"
        return None
    report.decoding = "derived"
    report.steps.append(Step("derive decoding", raised.code, decoding.code))
    return decoding


def sound_base(
    prepared: Prepared, report: Report, settings: Verification
) -> tuple[Program, Baseline]:
    """The furthest stage that still equals the model, and the baseline for programs of its kind.

    What is given up is noted in the report.

    Raises:
        VerificationError: the captured program itself differs from the model.
    """
    captured = prepared.captured
    whole = Baseline.whole(captured, settings)
    check_capture(prepared.model, whole)
    if prepared.decoding is not None:
        sessions = Baseline.decoding(captured, settings)
        problem = sessions.mismatch(prepared.decoding)
        if not problem:
            return prepared.decoding, sessions
        report.decoding = f"not derived: it differed from the model ({problem})"
        report.misses.append(Miss("derive-decoding", f"the derived program differed: {problem}"))
    problem = whole.mismatch(prepared.raised)
    if not problem:
        return prepared.raised, whole
    report.notes.append(
        f"raising was undone: the raised program differed from the model ({problem})"
    )
    report.coverage = tuple(dataclasses.replace(c, raised=0) for c in report.coverage)
    problem = whole.mismatch(captured)
    if problem:
        raise VerificationError(f"the captured program is not reproducible: {problem}")
    return captured.clone(), whole
