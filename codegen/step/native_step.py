"""A decode step as compiled C++, for the shapes that were asked for, with PyTorch for everything else."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from codegen.cache import content_hash
from codegen.cpp_kernels.compiler import compile_library, inline_headers
from codegen.step.emitters import emitters
from codegen.step.extent import CAPACITY, ENTRIES
from codegen.step.plan import Export, Plan, Planner, TorchCall
from codegen.step.probe import probe
from codegen.step.products import MAX_ROWS
from codegen.step.text import step_text

__all__ = ["CompiledStep", "NativeStep"]

log = logging.getLogger("rewriter")

_HEADER = """\
// A decode step: {rows} row(s), one new token each. {phases} calls in {segments} segment(s).
// Made by codegen/step from a graph of {nodes} nodes, {hash}.
// Values between calls are fp32 in the arena, rounded to the graph's dtype.
"""


_SHARES_BYTES = 128
"""Size and alignment of `rw::Shares`."""


class NativeStep:
    """A program's `run`: one new token per row goes through C++, anything else through `fallback`.

    Args:
        module: the program's graph module; its weights are bound as they are.
        growing: name of each state placeholder to the dimension that is its capacity, or None.
        fallback: runs the placeholders of the graph in order.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        growing: Mapping[str, int | None],
        fallback: Callable[..., Any],
    ) -> None:
        self.module, self.growing, self.fallback = module, growing, fallback
        self.names = [node.name for node in module.graph.find_nodes(op="placeholder")]
        self._ids = self.names.index("input_ids")
        self._states = [self.names.index(name) for name in growing if name in self.names]
        self._steps: dict[tuple[Any, ...], CompiledStep | None] = {}

    def __call__(self, *args: Any) -> Any:
        """As the program's graph."""
        ids = args[self._ids]
        fits = ids.shape[1] == 1 and ids.shape[0] <= MAX_ROWS and ids.device.type == "cpu"
        if not (fits and all(args[i].is_contiguous() for i in self._states)):
            return self.fallback(*args)
        step = self.step(args)
        return self.fallback(*args) if step is None else step(args)

    def step(self, args: tuple[Any, ...]) -> CompiledStep | None:
        """The compiled step for arguments like these; None where nothing of it is C++."""
        key = (args[self._ids].shape[0], tuple(a is None for a in args), torch.get_num_threads())
        if key not in self._steps:
            self._steps[key] = self._compiled(args)
        return self._steps[key]

    def summary(self) -> str:
        """How much of the steps tried so far is C++, and what is not."""
        tried = [step for step in self._steps.values() if step is not None]
        if not tried:
            return "no decode step is C++ yet"
        plan = tried[-1].plan
        told = f"a decode step is {plan.phases} C++ calls in {plan.segments} segment(s)"
        left = list(dict.fromkeys(why for why in plan.refusals.values() if "getitem" not in why))
        return told + (f"; left to PyTorch: {'; '.join(left[:3])}" if left else "")

    def plan(self, args: tuple[Any, ...]) -> Plan:
        """What would be compiled for arguments like these."""
        given = dict(zip(self.names, args, strict=True))

        def inputs(point: dict[str, int]) -> list[Any]:
            return [self._stand_in(name, value, point) for name, value in given.items()]

        facts = probe(self.module, inputs)
        return Planner(self.module, facts, frozenset(self.growing), emitters()).run()

    def _stand_in(self, name: str, value: Any, point: dict[str, int]) -> Any:
        if name == "kv_offset":
            return point[ENTRIES]
        if name == "logits_to_keep":
            return 1
        if not isinstance(value, Tensor):
            return value
        shape = list(value.shape)
        dim = self.growing.get(name)
        if dim is not None:
            shape[dim] = point[CAPACITY]
        if name == "k_positions":
            shape[1] = point[ENTRIES] + 1
        return torch.empty(shape, dtype=value.dtype)

    def _compiled(self, args: tuple[Any, ...]) -> CompiledStep | None:
        plan = self.plan(args)
        for name, reason in plan.refusals.items():
            log.info("left to PyTorch: %s: %s", name, reason)
        if not plan.phases:
            return None
        text = self._text(plan, args[self._ids].shape[0])
        library = compile_library(text)
        return CompiledStep(self.module, self.names, self.growing, plan, text, library)

    def _text(self, plan: Plan, rows: int) -> str:
        text = step_text([stage.segment for stage in plan.stages if stage.segment.lines])
        header = _HEADER.format(
            rows=rows,
            phases=plan.phases,
            segments=plan.segments,
            nodes=len(self.module.graph.nodes),
            hash=content_hash(text),
        )
        return header + inline_headers(text)


@dataclass(frozen=True)
class _Pointer:
    """Where the pointer at an index comes from at every call."""

    index: int
    key: str
    is_result: bool


class CompiledStep:
    """A plan with the C++ `text` and its library; calls are serialised, as they share the arena."""

    def __init__(
        self,
        module: fx.GraphModule,
        names: list[str],
        growing: Mapping[str, int | None],
        plan: Plan,
        text: str,
        library: ctypes.CDLL,
    ) -> None:
        self.module, self.names, self.plan = module, names, plan
        self.text, self.library = text, library
        self.arena = torch.zeros(plan.arena_floats + 16)
        self._arena_at = -(-self.arena.data_ptr() // 64) * 64
        self._arena = self.arena[(self._arena_at - self.arena.data_ptr()) // 4 :]
        most = max(stage.segment.phases for stage in plan.stages)
        self._shares_memory = torch.zeros(_SHARES_BYTES * (most + 1), dtype=torch.uint8)
        self._shares = -(-self._shares_memory.data_ptr() // _SHARES_BYTES) * _SHARES_BYTES
        self._threads = torch.get_num_threads()
        self._pointers = (ctypes.c_void_p * max(len(plan.slots), 1))()
        self._weights: list[Tensor] = []
        self._inputs: list[_Pointer] = []
        for i, slot in enumerate(plan.slots):
            if slot.kind == "weight":
                self._bind(i, slot.key)
            else:
                self._inputs.append(_Pointer(i, slot.key, slot.kind == "result"))
        self._capacity = next(((n, d) for n, d in growing.items() if d is not None), None)
        self._lock = threading.Lock()
        self._stages = [self._stage(stage) for stage in plan.stages]
        self._output = next(iter(module.graph.find_nodes(op="output")))

    def __call__(self, args: tuple[Any, ...]) -> Any:
        """Run the step. Raises nothing of its own: what PyTorch runs may."""
        values = dict(zip(self.names, args, strict=True))
        entries = values.get("kv_offset") or 0
        capacity = 0
        if self._capacity is not None and self._capacity[0] in values:
            capacity = values[self._capacity[0]].shape[self._capacity[1]]
        with self._lock, torch.no_grad():
            kept: list[Tensor] = []
            self._point(values, kept, is_result=False)
            for calls, run in self._stages:
                for call in calls:
                    values[call.name] = call.run(values)
                if run is not None:
                    self._point(values, kept, is_result=True)
                    run(
                        self._pointers,
                        self._arena_at,
                        self._shares,
                        entries,
                        capacity,
                        self._threads,
                    )
            return fx.map_arg(self._output.args[0], lambda n: values[n.name])

    def _point(self, values: dict[str, Any], kept: list[Tensor], *, is_result: bool) -> None:
        for pointer in self._inputs:
            if pointer.is_result == is_result and pointer.key in values:
                tensor = values[pointer.key].contiguous()
                kept.append(tensor)  # a copy has to live until the call is over
                self._pointers[pointer.index] = tensor.data_ptr()

    def _bind(self, index: int, path: str) -> None:
        value = attrgetter(path)(self.module)
        self._weights.append(value.detach())
        self._pointers[index] = value.data_ptr()

    def _stage(self, stage: Any) -> tuple[list[Any], Any]:
        calls = [
            _ExportCall(call, self._arena)
            if isinstance(call, Export)
            else _NodeCall(call, self.module)
            for call in stage.calls
        ]
        if not stage.segment.lines:
            return calls, None
        run = self.library[f"segment{stage.segment.index}"]
        run.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, ctypes.c_int]
        run.restype = None
        return calls, run


class _ExportCall:
    """A tensor out of the arena: a copy, as the next step writes there again."""

    def __init__(self, export: Export, arena: Tensor) -> None:
        self.name = export.name
        view = torch.as_strided(
            arena,
            export.shape,
            export.strides,
            arena.storage_offset() + export.place.offset,
        )
        self._view, self._dtype = view, export.dtype

    def run(self, values: dict[str, Any]) -> Tensor:
        """The tensor. What was read meanwhile has pushed this code out of the caches: a plain clone is
        the least of it."""
        view = self._view
        return view.clone() if view.dtype == self._dtype else view.to(self._dtype)


class _NodeCall:
    """A node of the graph, run by PyTorch."""

    def __init__(self, call: TorchCall, module: fx.GraphModule) -> None:
        self.name, self._node, self._module = call.node.name, call.node, module

    def run(self, values: dict[str, Any]) -> Any:
        """Its result."""
        node: Any = self._node
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(n, values))
        return node.target(*args, **kwargs)

    def _value(self, node: fx.Node, values: dict[str, Any]) -> Any:
        return (
            values[node.name]
            if node.op != "get_attr"
            else attrgetter(str(node.target))(self._module)
        )
