"""`measure_quality`: what rewrites of a model cost in quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from codegen.cpp_kernels.compiler import find_compiler
from rewriter.api import PassSpecs, optimize_variants, resolve_passes
from rewriter.capture.causal_lm import max_positions
from rewriter.engine.rewrite_pass import Fidelity as PassFidelity
from rewriter.errors import ConfigError, InputError, ModelError
from rewriter.optimized import OptimizedModel
from rewriter.quality.encoding import Encoding
from rewriter.quality.report import QualityReport
from rewriter.quality.suite import Settings, Suite
from rewriter.quality.variants import Plan, Variant, plans

__all__ = ["measure_quality"]

OnStage = Callable[..., None]

COMPILE_FROM = 1000
"""Tokens that each variant reads one by one from which compiling its decode step saves time."""


def measure_quality(
    model: nn.Module,
    tokenizer: Any,
    *,
    passes: PassSpecs = "default",
    densities: Sequence[float] = (),
    against: PassSpecs | None = None,
    controls: bool = True,
    settings: Settings | None = None,
    name: str = "",
    on_stage: OnStage | None = None,
) -> QualityReport:
    """Compare rewrites of a causal language model with the model, on tasks and texts.

    Args:
        model, tokenizer: of Hugging Face.
        passes: the methods, applied together. densities: shares in (0, 1] at which each of them that
            drops something is measured; none = the knobs as they are.
        against: what accuracies are compared with; None = the model itself.
        controls: also measure what the methods have to beat at equal bytes.
        settings: tasks, texts, lengths and seeds.
        on_stage: called with what is being done and, where it is known, the share that is done.

    Returns:
        results of `against` first, then of each variant. The model's own function is the program
        that the default passes make of it, checked against the model's forward as always.

    Raises:
        ConfigError, InputError: settings that cannot be measured, or a text that cannot be read.
        ModelError: a tokenizer that does not fit. InputError: a model whose decoding is not derived.
    """
    say = on_stage or (lambda *_: None)
    chosen, methods = settings or Settings(), resolve_passes(passes)
    lossy = [m for m in methods if m.fidelity is PassFidelity.APPROXIMATE]
    if densities and not any(m.at_density(1.0, length=8) for m in lossy):
        raise ConfigError("density", list(densities), "only with a pass that drops something")
    base = Plan(tuple(map(str, [] if against is None else resolve_passes(against))))
    suite = Suite(chosen, _encoding(tokenizer, model), max_positions(model))  # pyright: ignore[reportArgumentType]
    found = plans(lossy, densities, suite.length, controls=controls)
    wanted = [base, *(plan for plan in found if plan != base)]
    specs = [["default"], *([*plan.specs, "default"] for plan in wanted)]
    original, *built = optimize_variants(
        model,
        specs,
        backend=_backend(model, suite),
        on_stage=lambda stage: say(f"optimize: {stage}"),
    )
    if original.program.decoding is None:
        raise InputError(f"quality needs incremental decoding: {original.report.decoding}")
    variants = [_variant(plan, each) for plan, each in zip(wanted, built, strict=True)]
    results = suite.run(original, variants, say)
    asked = dataclasses.asdict(chosen) | {"length": suite.length, "densities": list(densities)}
    asked["against"] = base.label
    return QualityReport(name or type(model).__name__, asked, original.report.versions, results)


def _backend(model: nn.Module, suite: Suite) -> str:
    """Compiled decode steps where reading is long and nothing stands against them."""
    devices = {parameter.device.type for parameter in model.parameters()}
    steps = sum(source.ids.shape[1] for source in suite.sources)
    worth_it = steps >= COMPILE_FROM and devices == {"cpu"} and find_compiler() is not None
    return "cpu" if worth_it else "auto"


def _variant(plan: Plan, built: OptimizedModel) -> Variant:
    certificates = built.report.certificates
    undone = tuple(f"{c.spec}: {c.reason}" for c in certificates if c.status == "rolled_back")
    applied = {c.spec for c in certificates if c.status != "rolled_back"}
    missing = [spec for spec in plan.specs if spec not in applied]
    if missing and not undone:
        reasons = [m.reason for m in built.report.misses if m.subject in missing[0]]
        raise ConfigError("passes", missing[0], f"one that applies ({(reasons or ['no site'])[0]})")
    return Variant(plan, built, undone)


def _encoding(tokenizer: Any, model: nn.Module) -> Encoding:
    config: Any = getattr(model, "config", None)
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise ModelError(
            "the model has no config.vocab_size: quality is for causal language models"
        )
    return Encoding(tokenizer, vocab_size)
