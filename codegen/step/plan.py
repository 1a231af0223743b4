"""From a graph to a plan: which nodes are C++, in which segments, and what PyTorch runs between them.

Stage i is what PyTorch runs first and then segment i. Every piece of work goes into the earliest stage in
which all it reads is there, so that work for PyTorch gathers in front and segments grow long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from codegen.step.extent import Extent
from codegen.step.pointwise import Expression, Product, emit_expression, why_not_pointwise
from codegen.step.probe import TensorFact
from codegen.step.share import SHARES_A_THREAD
from codegen.step.text import Arena, Parameters, Segment
from codegen.step.value import CPP_TYPES, Place, Refusal, Value, contiguous_strides
from codegen.step.views import VIEWS

__all__ = ["Plan", "Planner", "Slot", "Stage", "TorchCall"]


@dataclass(frozen=True)
class Slot:
    """What a pointer points to: a `"weight"` by path, an `"input"` or a PyTorch `"result"` by node name."""

    kind: str
    key: str


@dataclass(frozen=True)
class Export:
    """A tensor in the arena that PyTorch reads: as strided, then cast."""

    name: str
    place: Place
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class TorchCall:
    """A node that PyTorch runs; its arguments are nodes of the graph and constants."""

    node: fx.Node


@dataclass
class Stage:
    """What PyTorch runs, in order, and then a segment."""

    segment: Segment
    calls: list[TorchCall | Export] = field(default_factory=list)


@dataclass
class Plan:
    """A planned step.

    Attributes:
        stages: the last one's segment is empty.
        refusals: why nodes were left to PyTorch.
    """

    stages: list[Stage]
    slots: list[Slot]
    arena_floats: int
    refusals: dict[str, str]

    @property
    def phases(self) -> int:
        """C++ calls of one step."""
        return sum(stage.segment.phases for stage in self.stages)

    @property
    def segments(self) -> int:
        """Parallel regions of one step."""
        return sum(bool(stage.segment.lines) for stage in self.stages)


class Planner:
    """Walks a graph once. Emitters read values from it and append phases to it."""

    def __init__(
        self,
        module: fx.GraphModule,
        facts: dict[fx.Node, Any],
        mutable: frozenset[str],
        emitters: dict[Any, Callable[[Planner, fx.Node], Value | Product | Expression | None]],
    ) -> None:
        self.module, self.facts, self.mutable, self.emitters = module, facts, mutable, emitters
        self.arena, self.threads = Arena(), torch.get_num_threads()
        self.stages: list[Stage] = []
        self.slots: list[Slot] = []
        self.values: dict[fx.Node, Any] = {}
        self.refusals: dict[str, str] = {}
        self._slot_places: dict[tuple[str, str], Place] = {}
        self._ready: dict[Place, tuple[int, int]] = {}  # first stage for C++, for PyTorch
        self._torch_ready: dict[fx.Node, int] = {}
        self._stage(0)

    def run(self) -> Plan:
        """Plan all nodes up to the output, whose values end up with PyTorch."""
        for node in self.module.graph.nodes:
            if node.op == "call_function":
                self._visit(node)
            elif node.op == "output":
                for result in node.all_input_nodes:
                    self._to_torch(result)
        return Plan(self.stages, self.slots, self.arena.size, self.refusals)

    # What emitters use.

    def fact(self, node: fx.Node) -> TensorFact:
        """Shape and dtype of a tensor. Raises Refusal where they are not known."""
        fact = self.facts.get(node)
        if not isinstance(fact, TensorFact):
            raise Refusal(f"the shape of {node.name} is not known")
        return fact

    def extent(self, argument: Any) -> Extent:
        """An integer argument of a node. Raises Refusal where it is not known."""
        value = self.facts.get(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise Refusal(f"{argument} is not known")
        return value

    def tensor(self, node: Any) -> Value:
        """The tensor of a node where C++ can read it."""
        if not isinstance(node, fx.Node):
            raise Refusal(f"{node!r} is not a tensor")
        value = self.values.get(node)
        if isinstance(value, (Expression, Product)):
            value = self.values[node] = emit_expression(self, node)
        if value is None:
            value = self.values[node] = self._from_outside(node)
        if not isinstance(value, Value):
            raise Refusal(f"{node.name} is not one tensor")
        return value

    def shares_of(self, work: int, least: int) -> int:
        """Into how many shares to cut work, none of them less than `least`."""
        return max(1, min(work // least, SHARES_A_THREAD * self.threads))

    def is_mutable(self, node: fx.Node) -> bool:
        """Whether a node is state, or a view of it."""
        value = self.values.get(node)
        slot = value.place.slot if isinstance(value, Value) else None
        return node.name in self.mutable or (
            slot is not None and self.slots[slot].key in self.mutable
        )

    def contiguous(self, node: Any) -> Value:
        """Like `tensor`, in row-major order."""
        value = self.tensor(node)
        if value.is_contiguous:
            return value
        return self.copy(value, node)

    def in_arena(self, node: Any) -> Value:
        """Like `contiguous`, as fp32 in the arena."""
        value = self.contiguous(node)
        return value if value.place.slot is None else self.copy(value, node)

    def copy(self, value: Value, node: fx.Node) -> Value:
        """A row-major copy in the arena."""
        from codegen.step.pointwise import emit_copy

        return emit_copy(self, value, node)

    def new(self, node: fx.Node) -> Value:
        """Room in the arena for the result of a node."""
        fact = self.fact(node)
        return self.room(fact.shape, fact.dtype)

    def room(self, shape: tuple[Extent, ...], dtype: torch.dtype) -> Value:
        """Room in the arena, kept as fp32. Raises Refusal for what does not fit into floats."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise Refusal(f"{dtype} has no room among floats: float32 and bfloat16 do")
        value = Value(Place(None), shape, contiguous_strides(shape), dtype)
        return Value(self.arena.take(math.prod(value.fixed_shape)), shape, value.strides, dtype)

    def phase(
        self,
        node: fx.Node,
        name: str,
        body: str,
        parameters: Parameters,
        *headers: str,
        shares: int = 1,
    ) -> None:
        """Append C++ statements in so many shares; see `Segment.phase`."""
        places = [*parameters.reads, *parameters.writes]
        index = max((self._ready.get(place, (0, 0))[0] for place in places), default=0)
        self._stage(index).segment.phase(name, body, parameters, headers, node.name, shares)
        for place in parameters.writes:
            self._ready[place] = (index, index + 1)
        for place in parameters.reads:
            if place.slot is not None and self.slots[place.slot].key in self.mutable:
                self._ready[place] = (index, index + 1)

    # The walk.

    def _visit(self, node: fx.Node) -> None:
        if isinstance(self.facts.get(node), (int, str)):
            return  # an integer: known where it is needed
        try:
            if node.target in VIEWS:
                self.values[node] = VIEWS[node.target](self, node)
            elif node.target in self.emitters:
                self.values[node] = self.emitters[node.target](self, node)
            else:
                reason = why_not_pointwise(self, node)
                if reason is not None:
                    raise Refusal(reason)
                self.values[node] = Expression(node)
        except Refusal as reason:
            self.refusals[node.name] = f"{node.target}: {reason}"
            self.values.pop(node, None)
            self._to_torch(node)

    def _to_torch(self, node: fx.Node) -> int:
        """Have PyTorch hold the value of a node; the stage from which on it does."""
        if node.op in ("placeholder", "get_attr"):
            slot = self._slot_places.get(_slot_key(node))
            return 0 if slot is None else self._ready.get(slot, (0, 0))[1]
        if node not in self._torch_ready:
            exported = self._export(node)
            self._torch_ready[node] = self._call(node) if exported is None else exported
        return self._torch_ready[node]

    def _export(self, node: fx.Node) -> int | None:
        """Hand over a tensor that lies in the arena; None where it does not."""
        if node not in self.values:
            return None
        try:
            value = self.tensor(node)
            shape = value.fixed_shape
        except Refusal:
            return None
        strides = tuple(s for s in value.strides if isinstance(s, int))
        if value.place.slot is not None or len(strides) != len(shape):
            return None
        assert isinstance(value.start, int)
        place = Place(None, value.place.offset + value.start)
        ready = self._ready[value.place][1]
        self._stage(ready).calls.append(Export(node.name, place, shape, strides, value.dtype))
        return ready

    def _call(self, node: fx.Node) -> int:
        """Have PyTorch run a node, after whatever it reads or changes."""
        stage = max((self._to_torch(n) for n in node.all_input_nodes), default=0)
        self._stage(stage).calls.append(TorchCall(node))
        for given in node.all_input_nodes:
            if given.name in self.mutable:
                self._ready[self._slot(given)] = (stage, stage)
        return stage

    def _from_outside(self, node: fx.Node) -> Value:
        """A tensor that a pointer points to: a weight, an input, or what PyTorch computed."""
        fact = self.fact(node)
        if fact.dtype not in CPP_TYPES:
            raise Refusal(f"{node.name} is {fact.dtype}")
        place = self._slot(node)
        if node.op == "call_function":
            ready = self._to_torch(node)
            self._ready[place] = (ready, ready)
        strides = contiguous_strides(fact.shape)
        if node.op == "get_attr":
            strides = attrgetter(str(node.target))(self.module).stride()
        return Value(place, fact.shape, strides, fact.dtype)

    def _slot(self, node: fx.Node) -> Place:
        key = _slot_key(node)
        if key not in self._slot_places:
            element = CPP_TYPES.get(self.fact(node).dtype, "void")
            self._slot_places[key] = Place(len(self.slots), 0, element)
            self.slots.append(Slot(*key))
        return self._slot_places[key]

    def _stage(self, index: int) -> Stage:
        while len(self.stages) <= index:
            self.stages.append(Stage(Segment(len(self.stages))))
        return self.stages[index]


def _slot_key(node: fx.Node) -> tuple[str, str]:
    if node.op == "get_attr":
        return "weight", str(node.target)
    return ("input" if node.op == "placeholder" else "result"), node.name
