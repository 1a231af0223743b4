"""A .pt2 in memory: an `OptimizedModel` that runs what was compiled when it was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.decoding.state import Session
from rewriter.errors import ArtifactError
from rewriter.export.artifact import DAMAGE, program_from_json
from rewriter.export.pt2_archive import Pt2File, open_pt2
from rewriter.export.pt2_cpu import missing_features
from rewriter.export.pt2_entry import Limits, state_buffer, state_shape
from rewriter.export.pt2_run import CompiledEntry, ModuleRun, TokenRun
from rewriter.export.pt2_step import CarriedSteps, load_step
from rewriter.export.pt2_weights import map_weights
from rewriter.lowering import choose_backend
from rewriter.optimized import OptimizedModel
from rewriter.program import Program, StateSpec
from rewriter.report.json import report_from_json

__all__ = ["Pt2Model", "load_pt2"]

BACKEND = "pt2"
"""What the report of a loaded artifact names as its backend."""


class Pt2Model(OptimizedModel):
    """A loaded artifact. Sessions of its own batch have room for `max_length` entries; calls that it was
    not compiled for run like the `eager` backend."""

    limits: Limits | None = None

    def session(
        self, batch_size: int, *, capacity: int | None = None, prefill_chunk: int | None = None
    ) -> Session:
        """Fresh decoding state; as of `OptimizedModel`, in the shape of the compiled entries if it fits."""
        limits = self.limits
        if (
            limits is not None
            and batch_size == limits.batch
            and (capacity or 0) <= limits.max_length
        ):
            capacity = limits.max_length
        return super().session(batch_size, capacity=capacity, prefill_chunk=prefill_chunk)


def load_pt2(path: str | Path, *, check_weights: bool = True) -> OptimizedModel:
    """Read an artifact: weights are mapped, nothing is compiled.

    On a processor without the instructions it was compiled for, or with another version of PyTorch, its
    graph runs on the best backend there is instead, and `report.notes` says so.

    Args:
        check_weights: False trusts the bytes of the weights, which are then read when they are used.

    Raises:
        ArtifactError: it is missing, damaged, or of another version.
    """
    file = open_pt2(path, check_weights=check_weights)
    metadata = file.metadata
    try:
        tensors = map_weights(file)
        program = program_from_json(json.loads(file.read("program.json")), tensors)
        report = report_from_json(metadata["report"])
        limits = Limits(**metadata["limits"]) if metadata["limits"] else None
    except (ArtifactError, *DAMAGE) as error:
        raise ArtifactError(f"{file.path} is damaged: {error}") from error
    given = {name: metadata[name] for name in ("config", "generation_config")}
    reason = _why_not_here(metadata)
    if reason is not None:
        chosen = choose_backend("auto", program)
        report.notes.append(f"the compiled parts of the .pt2 are not used: {reason}")
        report.backend, report.backend_reason = chosen.name, chosen.reason
        return OptimizedModel(program, report, backend=chosen.name, **given)
    model = Pt2Model(program, report, backend="eager", **given)
    model.limits = limits
    report.backend, report.backend_reason = BACKEND, _use(file, model, tensors)
    return model


def _why_not_here(metadata: dict[str, Any]) -> str | None:
    missing = missing_features(metadata["cpu"])
    if missing:
        return f"this processor has no {', '.join(missing[:4])}"
    made, here = (_minor(v) for v in (metadata["versions"]["torch"], torch.__version__))
    return None if made == here else f"they were made with torch {made}, this is {here}"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _use(file: Pt2File, model: Pt2Model, tensors: dict[str, Tensor]) -> str:
    """Let the model run the compiled entries over these tensors; says what they are."""
    program, metadata, limits = model.program, file.metadata, model.limits
    constants = {name: tensors[tensor] for name, tensor in metadata["constants"].items()}
    if limits is None or program.decoding is None:
        (name,) = metadata["entries"]
        model.run = ModuleRun(program, CompiledEntry(file, name, constants))
        return f"AOTInductor: {name}"
    states = {state_buffer(s.name): _placeholder(s, limits) for s in program.decoding.states}
    entries = {name: CompiledEntry(file, name, constants | states) for name in metadata["entries"]}
    run: Any = TokenRun(program, entries, limits, model.run)
    told = f"AOTInductor: {', '.join(entries)}; batch {limits.batch}"
    if any(not spec.bounded for spec in program.decoding.states):
        told += f", {limits.max_length} entries"
    told += "; other batches run on eager"
    if metadata["native"]:
        steps = dict(_step(file, program, stem) for stem in metadata["native"])
        run = CarriedSteps(run.names, list(run.shapes), steps, run)
        told += f"; {run.summary()}"
    model.run = run
    return told


def _placeholder(spec: StateSpec, limits: Limits) -> Tensor:
    """A state until a session brings its own: no memory is touched."""
    return torch.empty(state_shape(spec, limits), dtype=spec.dtype)


def _step(file: Pt2File, program: Program, stem: str) -> Any:
    stored = json.loads(file.read(f"native/{stem}.json"))
    text = file.read(f"native/{stem}.cpp").decode()
    return load_step(program, stored, text, file.read(f"native/{stem}.so"))
