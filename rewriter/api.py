"""`optimize`: capture, raise, derive, rewrite, verify. The only place that brings the packages together."""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import passes as table  # the names are looked up late: passes import rewriter first
from rewriter.capture.causal_lm import capture_causal_lm, is_causal_lm
from rewriter.capture.module import capture
from rewriter.capture.sources import load_model
from rewriter.decoding.derive import derive
from rewriter.engine.miss import Miss
from rewriter.engine.pipeline import PipelineResult, apply_passes, check_conflicts
from rewriter.engine.rewrite_pass import RewritePass
from rewriter.engine.spec_text import parse_spec
from rewriter.errors import ConfigError, RewriteError, VerificationError
from rewriter.lowering import choose_backend
from rewriter.optimized import OptimizedModel
from rewriter.program import Program
from rewriter.raising import raise_program
from rewriter.report.report import Report, Step
from rewriter.verify.certificate import Certificate
from rewriter.verify.rollback import Verified, Verifier
from rewriter.verify.verification import Verification

__all__ = ["PassInfo", "explain", "list_passes", "load", "optimize", "verify_against"]

log = logging.getLogger("rewriter")

PassSpecs = str | Sequence[str | RewritePass]
OnStage = Callable[[str], None]


def optimize(
    model: nn.Module | str | Path,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    passes: PassSpecs = "default",
    backend: str = "auto",
    verify: bool | Verification = True,
    calibration: Iterable[Any] | None = None,
    strict: bool = False,
    on_stage: OnStage | None = None,
) -> OptimizedModel:
    """Rewrite a model into an equivalent or, where asked for, approximate one that runs faster.

    Args:
        model: a module, or a path to a Hugging Face model directory. It is not changed; the result
            shares its weights.
        example_inputs: positional or keyword arguments of forward; may be omitted for a Hugging Face
            causal language model.
        passes: "default" (exact and reassociated ones), or specs such as
            `"streaming-llm{num_sink_tokens=4,recent_window=252}"`, or pass objects, in order.
        backend: "auto", "eager" or "inductor".
        verify: False leaves rewrites unverified; a `Verification` sets inputs and limits.
        calibration: inputs for passes that need thresholds.
        strict: a requested pass that matches nothing, or a rewrite that has to be undone, raises.
        on_stage: called with the name of each stage as it starts.

    Returns:
        a model with the same inputs and outputs, `generate` for causal language models, and `report`.

    Raises:
        ConfigError: an unknown pass, knob or backend, or conflicting passes.
        ModelError: a model that cannot be read. CaptureError: one that cannot be traced.
        RewriteError, VerificationError: with `strict`.
    """
    chosen = choose_backend(backend)
    requested = resolve_passes(passes)
    report = _new_report(model, requested, chosen.name, chosen.reason)
    clock = _Clock(report, on_stage)
    with clock("load"):
        loaded, directory = _load(model)
    with clock("capture"):
        captured = _capture(loaded, example_inputs)
    report.seconds["export"] = captured.meta.get("export_seconds", 0.0)
    report.baked = captured.baked
    raised, decoding = _raise_and_derive(captured, report, clock)
    verifier = None
    if verify:
        with clock("baseline"):
            settings = verify if isinstance(verify, Verification) else Verification()
            verifier = Verifier(captured, settings)
            base = _sound_base(verifier, captured, raised, decoding, report)
    else:
        base = raised if decoding is None else decoding
    with clock("rewrite and verify" if verifier else "rewrite"):
        verified = verifier.verify(base, requested) if verifier else _unverified(base, requested)
    _record(report, verified, base, captured)
    if strict:
        _demand_all(report, requested)
    with clock("lower"):
        return _optimized(loaded, verified.result.program, report, chosen.name, directory)


def explain(
    model: nn.Module | str | Path,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    passes: PassSpecs = "default",
    on_stage: OnStage | None = None,
) -> Report:
    """What would match and what would not, and why; nothing is verified.

    Arguments and errors as of `optimize`; the certificates are "unverified".
    """
    requested = resolve_passes(passes)
    report = _new_report(model, requested, "", "")
    clock = _Clock(report, on_stage)
    with clock("load"):
        loaded, _ = _load(model)
    with clock("capture"):
        captured = _capture(loaded, example_inputs)
    report.baked = captured.baked
    raised, decoding = _raise_and_derive(captured, report, clock)
    base = raised if decoding is None else decoding
    with clock("rewrite"):
        verified = _unverified(base, requested)
    _record(report, verified, base, captured)
    return report


def load(directory: str | Path) -> OptimizedModel:
    """Read what `OptimizedModel.save` wrote. Raises ArtifactError when it is missing or damaged."""
    from rewriter.export.artifact import load_optimized

    return load_optimized(Path(directory))


@dataclass(frozen=True)
class PassInfo:
    """A pass as it is listed."""

    name: str
    fidelity: str
    summary: str
    source: str
    knobs: dict[str, str]


def list_passes() -> tuple[PassInfo, ...]:
    """Every pass with its knobs and their defaults."""
    return tuple(_info(kind) for kind in table.PASSES.values())


def _info(kind: type[RewritePass]) -> PassInfo:
    summary = (kind.__doc__ or "").strip().splitlines()[0]
    knobs = {f.name: str(f.default) for f in dataclasses.fields(kind)}
    return PassInfo(kind.name, kind.fidelity.value, summary, kind.source, knobs)


def resolve_passes(passes: PassSpecs) -> list[RewritePass]:
    """Pass objects from "default", one spec, or a list of specs and objects. Raises ConfigError."""
    if isinstance(passes, str):
        passes = table.DEFAULT if passes == "default" else [passes]
    resolved: list[RewritePass] = []
    for item in passes:
        if isinstance(item, str) and item == "default":
            resolved += [parse_spec(text, table.PASSES) for text in table.DEFAULT]
        elif isinstance(item, str):
            resolved.append(parse_spec(item, table.PASSES))
        elif isinstance(item, RewritePass):
            resolved.append(item)
        else:
            raise ConfigError("passes", item, "a spec or a pass object")
    check_conflicts(resolved)
    return resolved


def verify_against(
    optimized: OptimizedModel,
    model: nn.Module | str | Path,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    verification: Verification | None = None,
) -> dict[str, float]:
    """Run an optimized model and a model side by side on this machine.

    Returns:
        the metrics of `Report.end_to_end`.

    Raises:
        VerificationError: every rewrite claims the model's function and the outputs still differ.
    """
    loaded, _ = _load(model)
    verifier = Verifier(_capture(loaded, example_inputs), verification or Verification())
    certificates = optimized.report.certificates
    applied = [c for c in certificates if c.status != "rolled_back"]
    if all(certificate.fidelity != "approximate" for certificate in applied):
        problem = verifier.mismatch(optimized.program)
        if problem:
            raise VerificationError(f"the optimized model differs from the model: {problem}")
    return verifier.metrics(optimized.program)


class _Clock:
    """Times stages into a report and announces them."""

    def __init__(self, report: Report, on_stage: OnStage | None) -> None:
        self.report, self.on_stage = report, on_stage

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        log.info("%s", stage)
        if self.on_stage is not None:
            self.on_stage(stage)
        start = time.perf_counter()
        yield
        self.report.seconds[stage] = time.perf_counter() - start


def _new_report(
    model: nn.Module | str | Path, passes: Sequence[RewritePass], backend: str, reason: str
) -> Report:
    import transformers

    name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    versions = {
        "rewriter": "0.1.0",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    specs = tuple(str(item) for item in passes)
    return Report(name, versions=versions, passes=specs, backend=backend, backend_reason=reason)


def _load(model: nn.Module | str | Path) -> tuple[nn.Module, Path | None]:
    if isinstance(model, nn.Module):
        return model, None
    directory = Path(model)
    return load_model(str(model)), directory if directory.is_dir() else None


def _capture(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None
) -> Program:
    if example_inputs is None and is_causal_lm(model):
        return capture_causal_lm(model)  # pyright: ignore
    return capture(model, example_inputs)


def _raise_and_derive(
    captured: Program, report: Report, clock: _Clock
) -> tuple[Program, Program | None]:
    """The raised program, and the decoding one where there is one."""
    with clock("raise"):
        raised = captured.clone()
        outcome = raise_program(raised)
        report.coverage = outcome.coverage
        report.misses += outcome.misses
    report.steps.append(Step("raise", captured.code, raised.code))
    if captured.meta.get("kind") != "causal_lm":
        report.decoding = "not a causal language model"
        return raised, None
    with clock("derive"):
        decoding = derive(raised)
    if isinstance(decoding, Miss):
        report.misses.append(decoding)
        report.decoding = f"not derived: {decoding.reason}"
        return raised, None
    report.decoding = "derived"
    report.steps.append(Step("derive decoding", raised.code, decoding.code))
    return raised, decoding


def _sound_base(
    verifier: Verifier,
    captured: Program,
    raised: Program,
    decoding: Program | None,
    report: Report,
) -> Program:
    """The furthest stage that still equals the model; what is given up is noted."""
    if decoding is not None:
        problem = verifier.mismatch(decoding)
        if not problem:
            return decoding
        report.decoding = f"not derived: it differed from the model ({problem})"
        report.misses.append(Miss("derive-decoding", f"the derived program differed: {problem}"))
    problem = verifier.mismatch(raised)
    if not problem:
        return raised
    report.notes.append(f"raising was undone: the raised program differed from the model ({problem})")
    report.coverage = tuple(dataclasses.replace(c, raised=0) for c in report.coverage)
    return captured.clone()


def _unverified(base: Program, passes: Sequence[RewritePass]) -> Verified:
    """Apply without checking; a pass that fails outright is still left out."""
    result = apply_passes(base, passes, keep_code=True)
    verified = Verified(result)
    for a in result.applied:
        common = (str(a.rewrite), a.rewrite.fidelity.value, a.label, a.key, a.source)
        verified.certificates.append(Certificate(*common, status="unverified"))
    for (spec, key), reason in result.failures.items():
        fidelity = next(p.fidelity.value for p in passes if str(p) == spec)
        verified.certificates.append(
            Certificate(spec, fidelity, key, key, "", status="rolled_back", reason=reason)
        )
    return verified


def _record(report: Report, verified: Verified, base: Program, captured: Program) -> None:
    result: PipelineResult = verified.result
    report.certificates = verified.certificates
    report.misses += result.misses
    report.end_to_end = verified.end_to_end
    for stage in result.stages:
        of_stage = tuple(c for c in report.certificates if c.spec == stage.spec)
        report.steps.append(Step(stage.spec, stage.code_before, stage.code_after, of_stage))


def _demand_all(report: Report, passes: Sequence[RewritePass]) -> None:
    """Strictness: every pass applied somewhere, and nothing was undone."""
    undone = [c for c in report.certificates if c.status == "rolled_back"]
    if undone:
        first = undone[0]
        raise VerificationError(f"strict: {first.spec} at {first.site} was undone: {first.reason}")
    used = {certificate.spec for certificate in report.certificates}
    for rewrite in passes:
        if str(rewrite) not in used:
            reasons = [m.reason for m in report.misses if m.subject == rewrite.name]
            why = reasons[0] if reasons else f"the model has no {rewrite.anchor}"
            raise RewriteError(f"strict: {rewrite} matched nothing: {why}")


def _optimized(
    model: nn.Module, program: Program, report: Report, backend: str, directory: Path | None
) -> OptimizedModel:
    config = getattr(model, "config", None)
    defaults = getattr(model, "generation_config", None)
    return OptimizedModel(
        program,
        report,
        config=config.to_dict() if hasattr(config, "to_dict") else None,
        generation_config=defaults.to_dict() if hasattr(defaults, "to_dict") else None,
        backend=backend,
        source_directory=directory,
    )
