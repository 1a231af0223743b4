"""Where the time of a compiled step goes: the same text with a clock around every phase and every wait."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter

import torch

from codegen.cpp_kernels.compiler import compile_library
from codegen.step.native_step import CompiledStep, NativeStep

__all__ = ["PhaseTime", "Profile", "profiled"]

_PHASE = "    rw::claim(shares[i], count, [&](int thread, int num_threads) { call; })\n"
_CLOCK = """
#include <chrono>
static double rw_times[{segments}][{phases}][{threads}][2];  // milliseconds in a phase, and waiting for it
extern "C" double* step_times() {{ return &rw_times[0][0][0][0]; }}
template <typename F> inline void rw_timed(double& to, F&& f) {{
    auto begin = std::chrono::steady_clock::now();
    f();
    to += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}}
"""
_SEGMENT = re.compile(r'extern "C" void segment(\d+)\(.*?^}\n', re.MULTILINE | re.DOTALL)
_CALL = re.compile(r"PHASE\((\d+), (\d+), (\w+)\((.*), STEP_ARGUMENTS\)\);  // (.*)")
_AWAIT = re.compile(r"rw::await\(shares\[(\d+)\], (\d+)\);")
_POINTER = re.compile(r"pointers\[(\d+)\]")
_NUMBERS = re.compile(r"_\d+_\d+$")


@dataclass(frozen=True)
class PhaseTime:
    """One phase, per step.

    Attributes:
        name: what it does. node: the graph's node that it comes from.
        ms: of a thread, in the mean: in it and waiting for the others to be done with it; all phases of
            a step together are the step.
        waiting_ms: the part that is waiting.
        bytes: of weights, and of keys and values kept, that it reads.
    """

    name: str
    node: str
    ms: float
    waiting_ms: float
    bytes: float


@dataclass(frozen=True)
class _Phase:
    segment: int
    index: int
    name: str
    node: str
    slots: tuple[int, ...]


class Profile:
    """What was recorded while `profiled` was active."""

    def __init__(self, timed: list[tuple[CompiledStep, list[_Phase]]]) -> None:
        self._timed = timed

    def restart(self) -> None:
        """Forget what was recorded so far."""
        for step, _ in self._timed:
            times = _times(step)
            ctypes.memset(step.library.step_times(), 0, times.nbytes)

    def phases(self, steps: int, state_bytes: Mapping[str, float]) -> list[PhaseTime]:
        """In the order of the step that ran.

        Args:
            steps: how many were run.
            state_bytes: of each state by name, how many bytes an attention to all that is kept reads.
        """
        for step, phases in self._timed:
            times = _times(step) / steps
            if float(times.sum()):
                return [_phase_time(step, phase, times, state_bytes) for phase in phases]
        return []


@contextmanager
def profiled(native: NativeStep) -> Iterator[Profile]:
    """Record, inside, what every step compiled so far does; they run with clocks, a little slower.

    Raises:
        ConfigError, CompileError: as of `compile_library`.
    """
    before = dict(native._steps)
    timed = list[tuple[CompiledStep, list[_Phase]]]()
    try:
        for key, step in before.items():
            if step is not None:
                library = compile_library(_with_clocks(step))
                twin = CompiledStep(
                    step.module, step.names, native.growing, step.plan, step.text, library
                )
                native._steps[key] = twin
                timed.append((twin, _phases(step.text)))
        yield Profile(timed)
    finally:
        native._steps.clear()
        native._steps.update(before)


def _with_clocks(step: CompiledStep) -> str:
    def segment(match: re.Match[str]) -> str:
        at = f"rw_times[{match[1]}]"
        text = _CALL.sub(
            rf"rw_timed({at}[\1][omp_get_thread_num()][0], [&] {{ \g<0>\n}});", match[0]
        )
        waits = rf"rw_timed({at}[\1][omp_get_thread_num()][1], [&] {{ \g<0> }});"
        return _AWAIT.sub(waits, text)

    plan = step.plan
    most = max(stage.segment.phases for stage in plan.stages)
    clock = _CLOCK.format(segments=len(plan.stages), phases=most, threads=step._threads)
    return _SEGMENT.sub(segment, step.text.replace(_PHASE, _PHASE + clock, 1))


def _phases(text: str) -> list[_Phase]:
    return [
        _Phase(
            int(segment[1]),
            int(call[1]),
            _NUMBERS.sub("", call[3]),
            call[5],
            tuple(map(int, _POINTER.findall(call[4]))),
        )
        for segment in _SEGMENT.finditer(text)
        for call in _CALL.finditer(segment[0])
    ]


def _times(step: CompiledStep) -> torch.Tensor:
    """[segments, phases, threads, 2] milliseconds so far."""
    plan = step.plan
    shape = (len(plan.stages), max(s.segment.phases for s in plan.stages), step._threads, 2)
    function = step.library.step_times
    function.restype = ctypes.POINTER(ctypes.c_double)
    count = shape[0] * shape[1] * shape[2] * shape[3]
    return torch.tensor(function()[:count], dtype=torch.float64).view(shape)


def _phase_time(
    step: CompiledStep, phase: _Phase, times: torch.Tensor, state_bytes: Mapping[str, float]
) -> PhaseTime:
    busy, waiting = times[phase.segment, phase.index].mean(dim=0).tolist()
    slots = [step.plan.slots[i] for i in phase.slots]
    held = [attrgetter(s.key)(step.module) for s in slots if s.kind == "weight"]
    read = float(sum(w.nbytes for w in held)) if phase.name != "embedding" else 0.0
    if "attention" in phase.name:
        read += sum(state_bytes.get(slot.key, 0.0) for slot in slots)
    matrices = [w for w in held if w.dim() == 2]
    shape = " ×".join(f" {n:,}" for n in matrices[0].shape) if matrices else ""
    return PhaseTime(phase.name + shape, phase.node, busy + waiting, waiting, read)
