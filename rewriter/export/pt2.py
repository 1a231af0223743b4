"""Write a .pt2: AOTInductor entries, and decode steps as C++, over one set of weights.

The file is one that `torch::inductor::AOTIModelPackageLoader` reads. Entries and their inputs are those
of `pt2_entry`; weights and states are constants that the loading process hands to every entry (Python:
`load_pt2`; C++: `examples/cpp`), so they are there once, in the file and in memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.capture.guards import violated
from rewriter.errors import ConfigError, ExportError
from rewriter.export.artifact import distinct_weights, program_from_json, program_to_json
from rewriter.export.pt2_archive import WEIGHTS, Pt2Writer, writing
from rewriter.export.pt2_check import check_artifact
from rewriter.export.pt2_compile import Compiled, check_target, compile_entry
from rewriter.export.pt2_cpu import cpu_kind
from rewriter.export.pt2_entry import (
    LEAST_LENGTH,
    Entry,
    Limits,
    module_entry,
    state_buffer,
    state_shape,
    token_entries,
)
from rewriter.export.pt2_step import compiled_steps, step_to_json
from rewriter.export.pt2_weights import Layout, index_text, layout, raw_bytes
from rewriter.optimized import OptimizedModel
from rewriter.program import Program
from rewriter.report.json import report_to_json
from rewriter.stages import Clock
from rewriter.verify.inputs import whole_scenarios
from rewriter.verify.scenarios import FlatScenario
from rewriter.verify.verification import Verification

__all__ = ["Pt2Summary", "export_pt2"]

DEFAULT_LENGTH = 2048
"""Entries that a growing state has room for, unless the model has fewer positions."""

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Pt2Summary:
    """What was written.

    Attributes:
        entries: names of the compiled functions. native: carried decode steps.
        checked: cases that a new process computed as the program does.
        seconds: by stage.
    """

    path: Path
    file_bytes: int
    weight_bytes: int
    entries: tuple[str, ...]
    native: int
    limits: Limits | None
    checked: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict[str, float])


def export_pt2(
    optimized: OptimizedModel,
    path: str | Path,
    *,
    portable: bool = False,
    target: str = "cpu",
    max_length: int | None = None,
    batch: int | None = None,
    on_stage: OnStage | None = None,
) -> Pt2Summary:
    """Compile ahead of time, write the file all or nothing, and check it in a new process.

    Args:
        path: of the file; one that is there is replaced.
        portable: True leaves out the C++ decode steps: all that is compiled is AOTInductor's. Either
            file can be loaded without this package.
        target: "cpu", for processors with this one's instructions.
        max_length: entries that growing states have room for; None = the model's positions, at most
            2,048. batch: rows; None = 1. Both are of programs that decode.
        on_stage: called with the name of each stage as it starts.

    Raises:
        ConfigError: a target that is not here, no compiler, or a size that is not allowed.
        ExportError: an operator or a size that cannot be compiled.
        ArtifactError: the file cannot be written.
        VerificationError: what was written does not compute what the program computes. Like after every
            error, there is no file then.
    """
    check_target(target)
    path, stages = Path(path), Clock(on_stage)
    limits = _limits(optimized.program, max_length, batch)
    _demand_cpu(optimized.program)
    tensors, aliases = distinct_weights(optimized.program)
    stored = program_to_json(optimized.program, aliases)
    program = program_from_json(stored, tensors)  # what the loading process will have
    with writing(path) as temporary:
        compiled = _compile(optimized.program, program, limits, stages)
        native = [] if portable or limits is None else _native(program, limits, stages)
        constants = {name: alias["tensor"] for name, alias in aliases.items()}
        for entry in compiled:
            _add_constants(entry, tensors, constants)
        metadata = _metadata(optimized, limits, compiled, constants, layout(tensors))
        metadata |= {"native": [f"step{i}" for i in range(len(native))], "portable": portable}
        with stages("write"), temporary.open("wb") as file, Pt2Writer(file) as writer:
            _write(writer, tensors, metadata, stored, compiled, native)
            writer.seal(metadata)
        with stages("check"):
            checked = check_artifact(optimized, temporary, limits)
    return Pt2Summary(
        path=path,
        file_bytes=path.stat().st_size,
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        entries=tuple(entry.name for entry in compiled),
        native=len(native),
        limits=limits,
        checked=tuple(checked),
        seconds=stages.seconds,
    )


def _limits(program: Program, max_length: int | None, batch: int | None) -> Limits | None:
    """What states have room for; None for a program without."""
    if program.decoding is None:
        for name, value in (("max_length", max_length), ("batch", batch)):
            if value is not None:
                raise ConfigError(name, value, "nothing, for a program without decoding state")
        return None
    decoding = program.decoding
    most = decoding.max_positions or DEFAULT_LENGTH
    length = min(most, DEFAULT_LENGTH) if max_length is None else max_length
    if not LEAST_LENGTH <= length <= (decoding.max_positions or length):
        allowed = f"{LEAST_LENGTH} to {decoding.max_positions or 'any number of'} entries"
        raise ConfigError("max_length", length, allowed)
    if (decoding.max_chunk or LEAST_LENGTH) < LEAST_LENGTH:
        allowed = f"a pass that takes at least {LEAST_LENGTH} new tokens at once"
        raise ConfigError("max_chunk", decoding.max_chunk, allowed)
    if batch is not None and batch < 1:
        raise ConfigError("batch", batch, "an integer of at least 1")
    return Limits(batch or 1, length)


def _demand_cpu(program: Program) -> None:
    for parameter in program.module.parameters():
        if parameter.device.type != "cpu":
            raise ConfigError("device", str(parameter.device), "weights on the CPU")


def _compile(
    original: Program, program: Program, limits: Limits | None, stages: Clock
) -> list[Compiled]:
    """All entries. original: with the shapes it was traced for, which `program` has not."""
    entries: tuple[Entry, ...]
    if limits is None:
        example = _example(original)
        entries = (module_entry(program, [example[n.name] for n in program.placeholders()]),)
    else:
        entries = token_entries(program, limits)
    compiled = []
    for entry in entries:
        with stages(f"compile {entry.name}"):
            compiled.append(compile_entry(entry))
    return compiled


def _example(program: Program) -> Mapping[str, Tensor]:
    """Inputs by name that the program takes, with no dynamic dimension of 1: a trace would fix it."""
    dynamic = {
        spec.name: [i for i, dim in enumerate(spec.dims) if isinstance(dim, str)]
        for spec in program.signature.inputs
    }
    scenarios = [s for s in whole_scenarios(program, Verification()) if isinstance(s, FlatScenario)]
    for scenario in scenarios:
        open_sizes = [scenario.inputs[n].shape[i] for n, dims in dynamic.items() for i in dims]
        if min(open_sizes, default=2) > 1 and not _violated(program, scenario):
            return scenario.inputs
    return scenarios[0].inputs


def _violated(program: Program, scenario: FlatScenario) -> str | None:
    return violated(program.meta.get("guards", ()), scenario.inputs)


def _native(program: Program, limits: Limits, stages: Clock) -> list[Any]:
    with stages("compile decode steps"):
        return [step_to_json(*item) for item in compiled_steps(program, limits.batch).items()]


def _add_constants(entry: Compiled, tensors: dict[str, Tensor], constants: dict[str, str]) -> None:
    """Constants that a trace made, besides the weights."""
    for name, tensor in entry.constants.items():
        if name not in constants:
            constants[name] = name
            tensors[name] = tensor.contiguous()
        elif not torch.equal(tensors[constants[name]], tensor):
            raise ExportError(f"{entry.name} has another constant {name!r} than other entries")


def _metadata(
    optimized: OptimizedModel,
    limits: Limits | None,
    compiled: list[Compiled],
    constants: dict[str, str],
    placed: Layout,
) -> dict[str, Any]:
    """What `rewriter.json` says, but hashes."""
    program, report = optimized.program, optimized.report
    decoding = program.decoding
    return {
        "kind": "module" if decoding is None else "causal_lm",
        "name": program.name,
        "target": "cpu",
        "cpu": cpu_kind(),
        "passes": list(report.passes),
        "limits": dataclasses.asdict(limits) if limits else None,
        "states": [] if limits is None else _states(program, limits),
        "entries": {entry.name: {"inputs": entry.inputs} for entry in compiled},
        "constants": constants,
        "weights": placed,
        "max_positions": decoding.max_positions if decoding else None,
        "max_chunk": decoding.max_chunk if decoding else None,
        "vocab_size": program.meta.get("vocab_size"),
        "report": report_to_json(report),
        "config": optimized.config,
        "generation_config": optimized.generation_config,
        "versions": {**report.versions, "torch": torch.__version__},
    }


def _states(program: Program, limits: Limits) -> list[dict[str, Any]]:
    assert program.decoding is not None
    return [
        {
            "name": spec.name,
            "constant": state_buffer(spec.name),
            "dims": list(state_shape(spec, limits)),
            "dtype": str(spec.dtype).removeprefix("torch."),
            "fill": spec.fill,
            "role": spec.role,
            "layer": spec.layer,
        }
        for spec in program.decoding.states
    ]


def _write(
    writer: Pt2Writer,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    stored: dict[str, Any],
    compiled: list[Compiled],
    native: list[Any],
) -> None:
    """Every member but the metadata; the weights first, so that they start at a page."""
    writer.add(WEIGHTS, raw_bytes(tensors))
    states = {s["constant"]: (s["dtype"], s["fill"], s["dims"]) for s in metadata["states"]}
    text = index_text(metadata["weights"], metadata["constants"], states)
    writer.add("weights.txt", text.encode())
    writer.add("program.json", json.dumps(stored, default=str).encode())
    for i, (step, source, library) in enumerate(native):
        writer.add(f"native/step{i}.json", json.dumps(step).encode())
        writer.add(f"native/step{i}.cpp", source.encode())
        writer.add(f"native/step{i}.so", library)
    for entry in compiled:
        for name, content in entry.files.items():
            writer.add(f"data/aotinductor/{entry.name}/{name}", content)
    for name, data in _ARCHIVE.items():
        writer.add(name, data)


_ARCHIVE = {
    "archive_format": b"pt2",
    "archive_version": b"0",
    "byteorder": b"little",
    ".data/version": b"6\n",
}
"""What torch wants of an archive."""
