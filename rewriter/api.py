"""`optimize`: capture, raise, derive, rewrite, verify. The only place that knows the table of passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import passes as table  # the names are looked up late: passes import rewriter first
from codegen.tuning import tuning_lines
from rewriter.cost.context import current, on_backend
from rewriter.engine.pipeline import apply_passes, check_conflicts
from rewriter.engine.rewrite_pass import RewritePass
from rewriter.engine.spec_text import format_default, parse_spec
from rewriter.errors import ArtifactError, ConfigError, RewriteError, VerificationError
from rewriter.export.formats import artifact_kind
from rewriter.lowering import Described, Placed, choose_backend
from rewriter.optimized import OptimizedModel
from rewriter.program import Program
from rewriter.report.report import Report, Step
from rewriter.stages import (
    Clock,
    Examples,
    Model,
    OnStage,
    Prepared,
    capture_model,
    load_given,
    new_report,
    prepare,
    sound_base,
    undisturbed,
)
from rewriter.verify.artifact_check import compare_with
from rewriter.verify.baseline import Baseline
from rewriter.verify.certify import unverified_certificates
from rewriter.verify.lowered import check_lowered
from rewriter.verify.rollback import Verified, verify_and_rollback
from rewriter.verify.verification import Verification

__all__ = [
    "PassInfo",
    "explain",
    "list_passes",
    "load",
    "optimize",
    "optimize_variants",
    "verify_against",
]

PassSpecs = str | RewritePass | Sequence[str | RewritePass]


@undisturbed()
def optimize(
    model: Model,
    example_inputs: Examples = None,
    *,
    passes: PassSpecs = "default",
    backend: str = "auto",
    verify: bool | Verification = True,
    calibration: Iterable[object] | None = None,
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
        backend: "auto", "eager", "inductor", "cpu" (decode steps as compiled C++) or "triton" (generated
            kernels, on a GPU).
        verify: False leaves rewrites unverified; a `Verification` sets inputs and limits.
        calibration: inputs for passes that need thresholds; no pass in the table does yet.
        strict: a requested pass that matches nothing, or a rewrite that has to be undone, raises.
        on_stage: called with the name of each stage as it starts.

    Returns:
        a model with the same inputs and outputs, `generate` for causal language models, and `report`.

    Raises:
        ConfigError: an unknown pass, knob or backend, or conflicting passes.
        ModelError: a model that cannot be read. CaptureError: one that cannot be traced.
        VerificationError: what was captured differs from the model.
        RewriteError, VerificationError: with `strict`.
    """
    requested = resolve_passes(passes)
    choose_backend(backend)  # what cannot be is said before the work
    start = _start(model, example_inputs, verify, on_stage)
    return _rewritten(start, requested, backend, strict=strict, on_stage=on_stage)


@undisturbed()
def optimize_variants(
    model: Model,
    variants: Sequence[PassSpecs],
    *,
    backend: str = "auto",
    verify: bool | Verification = True,
    on_stage: OnStage | None = None,
) -> list[OptimizedModel]:
    """One model rewritten in several ways, in order; traced, derived and run for comparison once.

    Arguments and errors as of `optimize`; `variants` are what it takes as `passes`. All share the
    model's weights.
    """
    requested = [resolve_passes(passes) for passes in variants]
    choose_backend(backend)
    start = _start(model, None, verify, on_stage)
    return [_rewritten(start, passes, backend, on_stage=on_stage) for passes in requested]


@dataclass(frozen=True)
class _Start:
    """A model where passes begin: what they start from, and what they are compared with."""

    prepared: Prepared
    base: Program
    baseline: Baseline | None
    settings: Verification
    report: Report


def _start(
    model: Model, example_inputs: Examples, verify: bool | Verification, on_stage: OnStage | None
) -> _Start:
    report = new_report(model)
    clock = Clock(on_stage, report.seconds)
    prepared = prepare(model, example_inputs, report, clock)
    settings = verify if isinstance(verify, Verification) else Verification()
    if not verify:
        return _Start(prepared, prepared.base, None, settings, report)
    with clock("baseline"):
        base, baseline = sound_base(prepared, report, settings)
    return _Start(prepared, base, baseline, settings, report)


def _rewritten(
    start: _Start,
    passes: Sequence[RewritePass],
    backend: str,
    *,
    strict: bool = False,
    on_stage: OnStage | None = None,
) -> OptimizedModel:
    report, baseline = start.report.of_passes(map(str, passes)), start.baseline
    clock = Clock(on_stage, report.seconds)
    costed = _costed_on(start.base, backend, report)
    with clock("rewrite" if baseline is None else "rewrite and verify"), on_backend(costed):
        if baseline is None:
            verified = _unverified(start.base, passes)
        else:
            verified = verify_and_rollback(baseline, start.base, passes, start.settings)
    _record(report, verified)
    if strict:
        _demand_all(report, passes)
    with clock("lower"), tuning_lines(report.tuning):
        chosen = choose_backend(backend, verified.program)
        report.backend, report.backend_reason = chosen.name, chosen.reason
        optimized = _optimized(start.prepared, verified.program, report, chosen.name)
        if baseline is not None:
            check_lowered(verified, optimized.run, chosen.name, baseline)
        if isinstance(optimized.run, Described):
            report.backend_reason += f"; {optimized.run.summary()}"
        if isinstance(optimized.run, Placed):
            report.misses += optimized.run.misses()
    return optimized


@undisturbed()
def explain(
    model: Model,
    example_inputs: Examples = None,
    *,
    passes: PassSpecs = "default",
    on_stage: OnStage | None = None,
) -> Report:
    """What would match and what would not, and why; nothing is verified.

    Arguments and errors as of `optimize`; the certificates are "unverified".
    """
    requested = resolve_passes(passes)
    start = _start(model, example_inputs, False, on_stage)
    report = start.report.of_passes(map(str, requested))
    costed = _costed_on(start.base, "auto", report)
    with Clock(on_stage, report.seconds)("rewrite"), on_backend(costed):
        _record(report, _unverified(start.base, requested))
    return report


def load(path: str | Path) -> OptimizedModel:
    """Read what `OptimizedModel.save` wrote, or a `.pt2` of `OptimizedModel.export`.

    Raises:
        ArtifactError: it is missing, damaged, or of another kind.
    """
    kind = artifact_kind(Path(path))
    if kind == "pt2":
        from rewriter.export.pt2_model import load_pt2

        return load_pt2(path)
    if kind == "onnx":
        raise ArtifactError(f"{path} is for ONNX Runtime: use rewriter.deploy.OnnxDecoder")
    from rewriter.export.artifact import load_optimized

    return load_optimized(Path(path))


@undisturbed()
def verify_against(
    optimized: OptimizedModel,
    model: Model | None = None,
    example_inputs: Examples = None,
    verification: Verification | None = None,
) -> dict[str, float]:
    """Check an optimized model on this machine, side by side with the model it came from.

    Args:
        model: None checks only that it agrees with itself, however the tokens are fed.

    Returns:
        the metrics of `Report.end_to_end`.

    Raises:
        VerificationError: the outputs differ from the model's, or by more than was certified.
    """
    original = None if model is None else capture_model(load_given(model)[0], example_inputs)
    return compare_with(optimized.program, optimized.run, optimized.report, original, verification)


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
    knobs = {field.name: format_default(field) for field in dataclasses.fields(kind)}
    return PassInfo(kind.name, kind.fidelity.value, summary, kind.source, knobs)


def resolve_passes(passes: PassSpecs) -> list[RewritePass]:
    """Pass objects from "default", one spec, or a list of specs and objects. Raises ConfigError."""
    given = [passes] if isinstance(passes, str | RewritePass) else passes
    resolved: dict[RewritePass, None] = {}
    for item in given:
        texts = table.DEFAULT if item == "default" else (item,)
        resolved |= dict.fromkeys(_resolve(text) for text in texts)
    check_conflicts(list(resolved))
    return list(resolved)


def _resolve(item: object) -> RewritePass:
    if isinstance(item, RewritePass):
        return item
    if isinstance(item, str):
        return parse_spec(item, table.PASSES)
    raise ConfigError("passes", item, "a spec or a pass object")


def _unverified(base: Program, passes: Sequence[RewritePass]) -> Verified:
    """Apply without checking; a pass that fails outright is still left out."""
    result = apply_passes(base, passes, keep_code=True)
    return Verified(result, unverified_certificates(result, passes))


def _costed_on(base: Program, backend: str, report: Report) -> str | None:
    """The backend that times are predicted for; None where none are."""
    if current() is None:
        return None
    devices = {p.device.type for p in base.module.parameters()}
    if devices - {"cpu"}:
        report.notes.append(f"times are not predicted for weights on {', '.join(sorted(devices))}")
        return None
    return choose_backend(backend, base).name


def _record(report: Report, verified: Verified) -> None:
    report.certificates = verified.certificates
    report.misses += verified.result.misses
    report.end_to_end = verified.end_to_end
    for stage in verified.result.stages:
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
            why = reasons[0] if reasons else f"no {rewrite.anchor} in the layers it may touch"
            raise RewriteError(f"strict: {rewrite} matched nothing: {why}")


def _optimized(
    prepared: Prepared, program: Program, report: Report, backend: str
) -> OptimizedModel:
    return OptimizedModel(
        program,
        report,
        config=_as_dict(getattr(prepared.model, "config", None)),
        generation_config=_as_dict(getattr(prepared.model, "generation_config", None)),
        backend=backend,
        source_directory=prepared.directory,
    )


def _as_dict(config: Any) -> dict[str, Any] | None:
    """Of a Hugging Face configuration; None for anything else that a model may call so."""
    return config.to_dict() if hasattr(config, "to_dict") else None
