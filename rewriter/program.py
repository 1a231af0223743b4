"""The IR: one FX graph of ATen and dialect operators, how it is called, and the state it owns.

A `Program` is what every stage after capture reads and writes. Its module takes flat tensors and
returns flat tensors; `Signature` maps the model's own arguments and outputs to and from them. After
derivation `Decoding` lists the state: tensors that are placeholders of the graph, mutated in place by
dialect operators and owned by a session at run time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import rewriter.dialect  # noqa: F401  registers the operators that graphs name
from rewriter.source import source_line

__all__ = ["BakedDim", "Decoding", "InputSpec", "Program", "Signature", "StateSpec"]

Dim = int | str
"""A fixed extent, or the name of a dynamic one ("batch", "seq", "capacity", ...)."""


@dataclass(frozen=True)
class InputSpec:
    """One flat tensor input: its placeholder name, dtype and dimensions."""

    name: str
    dtype: torch.dtype
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Signature:
    """How the model is called and what it returns.

    Attributes:
        parameters: names of the model's `forward` parameters that capture was given, in order.
        inputs: the flat tensor inputs, in placeholder order.
        constants: arguments that were not tensors and are now baked in, e.g. `{"use_cache": False}`.
        in_spec: pytree spec of `(args, kwargs)`, its leaves being inputs and constants in order.
        leaf_names: for each leaf of `in_spec`, the placeholder name, or None for a constant.
        out_spec: pytree spec of what the model returns.
    """

    parameters: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    constants: dict[str, Any]
    in_spec: pytree.TreeSpec
    leaf_names: tuple[str | None, ...]
    out_spec: pytree.TreeSpec


@dataclass(frozen=True)
class BakedDim:
    """A dimension of an input that capture had to fix, and why."""

    input: str
    dim: int
    value: int
    reason: str


@dataclass(frozen=True)
class StateSpec:
    """One state tensor of a program: a placeholder that dialect operators mutate.

    Attributes:
        name: the placeholder's name, e.g. `layer0_keys`.
        dims: `"batch"` and `"capacity"` are dynamic; integers are fixed.
        role: what it holds: `keys`, `values`, `positions`, `scores`, ...
        fill: the value of an empty entry.
        layer: the attention it belongs to; None when layers share it.
        positions: the state that says which true position each slot of this one holds; None where
            entries stand in order and none is dropped.
    """

    name: str
    dims: tuple[Dim, ...]
    dtype: torch.dtype
    role: str
    fill: float = 0
    layer: int | None = None
    positions: str | None = None

    @property
    def bounded(self) -> bool:
        """Whether its size does not depend on how much was generated."""
        return "capacity" not in self.dims


@dataclass(frozen=True)
class Decoding:
    """Incremental decoding: the placeholders that a session feeds, and the state it owns.

    Placeholders the graph may have, all optional once nothing uses them (see `Program.prune_inputs`):

    * `input_ids` int64 [batch_size, q_len]
    * `position_ids` int64 [batch_size, q_len]: true positions, padding clamped to 0
    * `q_positions` int64 [batch_size, q_len] or None: true positions, padding = -1
    * `k_positions` int64 [batch_size, kv_len] or None: position of every dense entry, empty = -1
    * `kv_offset` int: dense entries kept before this call; the call appends q_len more
    * `logits_to_keep` int: how many last rows of logits to compute; 0 = all
    * every state of `states`

    `q_positions` and `k_positions` are None together: then row i of the queries is entry
    `kv_offset + i`, and entry j is at position j (no padding, nothing evicted).

    Attributes:
        states: the state tensors, in placeholder order.
        max_positions: positions the model can represent; None when unbounded.
        max_chunk: most new tokens a call may bring; None when unlimited.
        requires_positions: whether `q_positions` must be a tensor even without padding.
    """

    states: tuple[StateSpec, ...]
    max_positions: int | None = None
    max_chunk: int | None = None
    requires_positions: bool = False

    def state(self, name: str) -> StateSpec:
        """The state called `name`. Raises KeyError."""
        return {spec.name: spec for spec in self.states}[name]


@dataclass
class Program:
    """A graph of ATen and `rewriter::` operators that can be run, printed and rewritten."""

    module: fx.GraphModule
    signature: Signature
    name: str = "model"
    baked: tuple[BakedDim, ...] = ()
    decoding: Decoding | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The FX graph; call `finish()` after editing it."""
        return self.module.graph

    @property
    def code(self) -> str:
        """The program as readable Python."""
        return self.module.print_readable(print_output=False)

    def __call__(self, **inputs: Tensor | int | None) -> tuple[Tensor, ...]:
        """Run the graph on its placeholders by name (those it does not have are ignored)."""
        args = [inputs.get(node.name) for node in self.placeholders()]
        return self.module(*args)

    def placeholders(self) -> list[fx.Node]:
        """The inputs of the graph, in call order."""
        return list(self.graph.find_nodes(op="placeholder"))

    def placeholder(self, name: str) -> fx.Node | None:
        """The input called `name`, or None."""
        return next((node for node in self.placeholders() if node.name == name), None)

    def calls(self, target: Any) -> list[fx.Node]:
        """All calls of an operator, in topological order."""
        return list(self.graph.find_nodes(op="call_function", target=target))

    def finish(self) -> None:
        """Drop dead nodes, check the graph and regenerate the code, after edits."""
        self.graph.eliminate_dead_code(_has_effect)
        self.graph.lint()
        self.module.delete_all_unused_submodules()
        self.module.recompile()

    def prune_inputs(self) -> None:
        """Drop decoding placeholders and states that nothing uses any more."""
        if self.decoding is None:
            return
        keep = {spec.name for spec in self.signature.inputs}
        for node in self.placeholders():
            if not node.users and node.name not in keep:
                self.graph.erase_node(node)
        names = {node.name for node in self.placeholders()}
        states = tuple(spec for spec in self.decoding.states if spec.name in names)
        self.decoding = replace(self.decoding, states=states)

    def add_state(self, spec: StateSpec) -> fx.Node:
        """Declare a state and return its placeholder (the existing one if it is declared already)."""
        if self.decoding is None:
            raise ValueError(f"state {spec.name!r} on a program without decoding")
        existing = self.placeholder(spec.name)
        if existing is not None:
            return existing
        with self.graph.inserting_after(self.placeholders()[-1]):
            node = self.graph.placeholder(spec.name)
        self.decoding = replace(self.decoding, states=(*self.decoding.states, spec))
        return node

    def replace_state(self, spec: StateSpec) -> fx.Node:
        """Give the state called `spec.name` another shape, dtype, role or fill; its placeholder stays."""
        node = self.placeholder(spec.name)
        if self.decoding is None or node is None:
            raise ValueError(f"state {spec.name!r} is not declared")
        states = tuple(spec if old.name == spec.name else old for old in self.decoding.states)
        self.decoding = replace(self.decoding, states=states)
        node.meta.pop("val", None)  # the shape it was traced with
        return node

    def clone(self) -> Program:
        """An independent graph over the same weights."""
        root = fx.GraphModule(self.module, copy.deepcopy(self.graph))
        root.meta = dict(self.module.meta)
        return replace(self, module=root, meta=dict(self.meta))

    def source_lines(self) -> Iterator[tuple[fx.Node, str]]:
        """Each call with the line of the user's model it came from."""
        for node in self.graph.nodes:
            if node.op == "call_function":
                yield node, source_line(node)


def _has_effect(node: fx.Node) -> bool:
    """Whether a node has to stay though nothing reads it: inputs, the output, and writes to state."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
