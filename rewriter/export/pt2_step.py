"""Decode steps of `codegen/step` that travel: C++ source, the shared object, and how it is called.

A step is carried for each pattern of calls that decoding makes: with and without padding. It reads the
weights of the artifact where they are mapped, and the states of the session.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codegen.step.native_step import CompiledStep, NativeStep
from codegen.step.plan import Export, Plan, Slot, Stage, TorchCall
from codegen.step.text import Segment
from codegen.step.value import Place
from rewriter.decoding.state import Session
from rewriter.errors import ArtifactError
from rewriter.lowering import lower
from rewriter.program import Program

__all__ = [
    "CarriedSteps",
    "StepKey",
    "compiled_steps",
    "growing_states",
    "load_step",
    "step_to_json",
]

StepKey = tuple[int, tuple[bool, ...]]
"""Rows, and which placeholders are None."""


def growing_states(program: Program) -> dict[str, int | None]:
    """Name of each state to the dimension that is its capacity, or None."""
    assert program.decoding is not None
    return {
        spec.name: spec.dims.index("capacity") if "capacity" in spec.dims else None
        for spec in program.decoding.states
    }


def compiled_steps(program: Program, batch: int) -> dict[StepKey, CompiledStep]:
    """The steps that decoding `batch` rows takes; none where nothing of a step is C++."""
    native = NativeStep(program.module, growing_states(program), lower(program, "eager"))
    found: dict[StepKey, CompiledStep] = {}

    def run(*args: Any) -> Any:
        if args[native.names.index("input_ids")].shape[1] == 1:
            step = native.step(args)
            if step is not None:
                found[batch, tuple(value is None for value in args)] = step
        return native(*args)

    tokens = torch.zeros(batch, 2, dtype=torch.int64)
    masks = [None] if batch == 1 else [None, torch.ones_like(tokens).index_fill_(1, _FIRST, 0)]
    for mask in masks:
        session = Session(program, batch, run=run)
        session.run(tokens, attention_mask=mask, logits_to_keep=1)
        session.run(tokens[:, :1], logits_to_keep=1)
    return found


_FIRST = torch.tensor([0])


def step_to_json(key: StepKey, step: CompiledStep) -> tuple[dict[str, Any], str, bytes]:
    """How a step is called, its source, and its shared object."""
    plan = step.plan
    stored = {
        "rows": key[0],
        "absent": list(key[1]),
        "arena_floats": plan.arena_floats,
        "slots": [[slot.kind, slot.key] for slot in plan.slots],
        "stages": [_stage_to_json(stage) for stage in plan.stages],
        "refusals": plan.refusals,
    }
    return stored, step.text, Path(step.library._name).read_bytes()


def _stage_to_json(stage: Stage) -> dict[str, Any]:
    segment = stage.segment
    return {
        "segment": segment.index if segment.lines else None,
        "phases": segment.phases,
        "calls": [_call_to_json(call) for call in stage.calls],
    }


def _call_to_json(call: TorchCall | Export) -> dict[str, Any]:
    if isinstance(call, TorchCall):
        return {"node": call.node.name}
    return {
        "tensor": call.name,
        "offset": call.place.offset,
        "shape": list(call.shape),
        "strides": list(call.strides),
        "dtype": str(call.dtype).removeprefix("torch."),
    }


def load_step(
    program: Program, stored: Mapping[str, Any], text: str, library: bytes
) -> tuple[StepKey, CompiledStep]:
    """A carried step over a program that was read from the same artifact; compiles nothing.

    Raises:
        ArtifactError: it does not fit the program, or cannot be loaded.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    try:
        stages = [_stage_from_json(item, nodes) for item in stored["stages"]]
        slots = [Slot(kind, key) for kind, key in stored["slots"]]
        plan = Plan(stages, slots, int(stored["arena_floats"]), dict(stored["refusals"]))
        key = int(stored["rows"]), tuple(bool(flag) for flag in stored["absent"])
        names = [node.name for node in program.placeholders()]
        loaded = _loaded(library)
        step = CompiledStep(program.module, names, growing_states(program), plan, text, loaded)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ArtifactError(f"a carried decode step cannot be loaded: {error!r}") from error
    return key, step


def _stage_from_json(stored: Mapping[str, Any], nodes: Mapping[str, Any]) -> Stage:
    segment = Segment(stored["segment"] or 0, phases=int(stored["phases"]))
    if stored["segment"] is not None:
        segment.lines.append("// carried")
    return Stage(segment, [_call_from_json(item, nodes) for item in stored["calls"]])


def _call_from_json(stored: Mapping[str, Any], nodes: Mapping[str, Any]) -> TorchCall | Export:
    if "node" in stored:
        return TorchCall(nodes[stored["node"]])
    place = Place(None, int(stored["offset"]))
    dtype = getattr(torch, stored["dtype"])
    return Export(stored["tensor"], place, tuple(stored["shape"]), tuple(stored["strides"]), dtype)


def _loaded(library: bytes) -> ctypes.CDLL:
    """A shared object out of bytes; its file is gone once it is in memory."""
    with tempfile.TemporaryDirectory(prefix="rewriter-") as directory:
        place = Path(directory) / "step.so"
        place.write_bytes(library)
        return ctypes.CDLL(str(place))


class CarriedSteps:
    """A program's `run`: one new token a row goes through a carried step, the rest through `fallback`."""

    def __init__(
        self,
        names: Sequence[str],
        states: Sequence[str],
        steps: Mapping[StepKey, CompiledStep],
        fallback: Callable[..., Any],
    ) -> None:
        self.steps, self.fallback = dict(steps), fallback
        self._ids = names.index("input_ids")
        self._states = [names.index(name) for name in states]

    def __call__(self, *args: Any) -> Any:
        """As the program's graph."""
        ids: Tensor = args[self._ids]
        if ids.shape[1] == 1:
            step = self.steps.get((ids.shape[0], tuple(value is None for value in args)))
            if step is not None and all(args[i].is_contiguous() for i in self._states):
                return step(args)
        return self.fallback(*args)

    def summary(self) -> str:
        """How much of a step is C++."""
        plan = next(iter(self.steps.values())).plan
        return f"a decode step is {plan.phases} carried C++ calls in {plan.segments} segment(s)"
