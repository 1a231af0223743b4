"""A program as functions that AOTInductor compiles: ATen alone, state as buffers, positions as inputs.

| placeholder of the program | becomes |
|---|---|
| `input_ids` | the input `input_ids`, int64 [batch, q_len] |
| `q_positions`, `position_ids` | the input `positions`, int64 [batch, q_len], -1 = padding |
| `k_positions`, `kv_offset` | the input `entry_positions`, int64 [batch, total_len] |
| `logits_to_keep` | the input `rows`, int64 [n]: of which of the q_len rows logits are computed |
| a state | the buffer `state_<name>` of fixed capacity, mutated in place |

`entry_positions` says where every entry of the growing states stands, -1 = padding, those of this call
last; it is absent where no state grows. `decode` takes one token a row and has no `rows`. A program that
does not decode has one entry, `forward`, with its own inputs.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from rewriter.decoding.derive import logits_index
from rewriter.dialect import OPS
from rewriter.export.pt2_plain import PLAIN
from rewriter.program import Decoding, InputSpec, Program, StateSpec

__all__ = [
    "DECODE",
    "FORWARD",
    "LEAST_LENGTH",
    "PREFILL",
    "Entry",
    "Limits",
    "has_entry_positions",
    "module_entry",
    "state_buffer",
    "state_shape",
    "token_entries",
]

PREFILL, DECODE, FORWARD = "prefill", "decode", "forward"
aten = torch.ops.aten
_NEW, _KEPT = 7, 5
"""New tokens and kept entries of the call that is traced: no two of its sizes are the same."""
LEAST_LENGTH = 16
"""Entries, or tokens of one call, that an artifact has room for at least."""


@dataclass(frozen=True)
class Limits:
    """What the states of an artifact have room for: rows, and entries where a state grows."""

    batch: int
    max_length: int


@dataclass(frozen=True)
class Entry:
    """A function of an artifact.

    Attributes:
        module: a graph of ATen and plain functions, with its weights and states.
        inputs: names, dtypes and dimensions, where a name is a dynamic one.
        example: a call to trace.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    example: tuple[Tensor, ...]

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """As `torch.export.export` takes them."""
        return tuple(
            {i: Dim.AUTO for i, dim in enumerate(spec.dims) if isinstance(dim, str)}
            for spec in self.inputs
        )


def module_entry(program: Program, example: Sequence[Tensor]) -> Entry:
    """The one entry of a program that does not decode. example: a call, in placeholder order."""
    graph = _plain(copy.deepcopy(program.graph))
    module = fx.GraphModule(program.module, graph)
    return Entry(FORWARD, module, program.signature.inputs, tuple(example))


def token_entries(program: Program, limits: Limits) -> tuple[Entry, ...]:
    """`prefill` and `decode` of a program that decodes."""
    return tuple(_token_entry(program, limits, name) for name in (PREFILL, DECODE))


def state_buffer(name: str) -> str:
    """The name of the constant that holds a state."""
    return f"state_{name}"


def state_shape(spec: StateSpec, limits: Limits) -> tuple[int, ...]:
    """The extents of a state in an artifact."""
    extents = {"batch": limits.batch, "capacity": limits.max_length}
    return tuple(extents[dim] if isinstance(dim, str) else dim for dim in spec.dims)


def has_entry_positions(decoding: Decoding) -> bool:
    """Whether some state grows, so that a call has to say where its entries stand."""
    return not all(spec.bounded for spec in decoding.states)


def _token_entry(program: Program, limits: Limits, name: str) -> Entry:
    assert program.decoding is not None
    inputs = _token_inputs(program.decoding, limits, name)
    graph = fx.Graph()
    given = {spec.name: graph.placeholder(spec.name) for spec in inputs}
    values = _placeholder_values(graph, given, program.decoding)
    stand_ins: dict[fx.Node, Any] = {
        node: values[node.name]() for node in program.placeholders() if node.users
    }
    outputs: list[Any] = list(graph.graph_copy(program.graph, stand_ins))  # pyright: ignore
    if "rows" in given:
        _keep_rows(graph, given["rows"], outputs, logits_index(program))
    graph.output(tuple(outputs))
    root = fx.GraphModule(program.module, copy.deepcopy(program.graph))
    for spec in program.decoding.states:
        buffer = torch.full(state_shape(spec, limits), spec.fill, dtype=spec.dtype)
        root.register_buffer(state_buffer(spec.name), buffer)
    module = fx.GraphModule(root, _plain(graph))
    return Entry(
        name, module, inputs, _example(inputs, limits.batch, 1 if name == DECODE else _NEW)
    )


def _token_inputs(decoding: Decoding, limits: Limits, name: str) -> tuple[InputSpec, ...]:
    shape = (limits.batch, 1 if name == DECODE else "q_len")
    inputs = [InputSpec(field, torch.int64, shape) for field in ("input_ids", "positions")]
    if has_entry_positions(decoding):
        inputs.append(InputSpec("entry_positions", torch.int64, (limits.batch, "total_len")))
    if name == PREFILL:
        inputs.append(InputSpec("rows", torch.int64, ("n",)))
    return tuple(inputs)


def _example(inputs: Sequence[InputSpec], batch: int, q_len: int) -> tuple[Tensor, ...]:
    """New tokens behind a few kept ones."""
    positions = torch.arange(_KEPT + q_len).expand(batch, -1)
    values = {
        "input_ids": torch.zeros(batch, q_len, dtype=torch.int64),
        "positions": positions[:, _KEPT:].contiguous(),
        "entry_positions": positions.contiguous(),
        "rows": torch.arange(3),
    }
    return tuple(values[spec.name] for spec in inputs)


def _placeholder_values(
    graph: fx.Graph, given: dict[str, fx.Node], decoding: Decoding
) -> dict[str, Callable[[], Any]]:
    """By placeholder of the program: what makes its value at the head of an entry's graph."""

    def entries_before() -> fx.Node:
        total = graph.call_function(aten.sym_size.int, (given["entry_positions"], 1))
        own = graph.call_function(aten.sym_size.int, (given["input_ids"], 1))
        return graph.call_function(operator.sub, (total, own))

    values: dict[str, Callable[[], Any]] = {
        "input_ids": lambda: given["input_ids"],
        "q_positions": lambda: given["positions"],
        "k_positions": lambda: given["entry_positions"],
        "position_ids": lambda: graph.call_function(
            aten.clamp_min.default, (given["positions"], 0)
        ),
        "kv_offset": entries_before,
        "logits_to_keep": lambda: given.get("rows", 0),
    }
    for spec in decoding.states:
        values[spec.name] = lambda name=spec.name: graph.get_attr(state_buffer(name))
    return values


def _keep_rows(graph: fx.Graph, rows: fx.Node, outputs: list[Any], logits: int) -> None:
    """Logits of `rows`, cut where the program cuts the last ones, else at the end."""
    cuts = [last for start in rows.users for last in start.users]
    for last in cuts:
        with graph.inserting_before(last):
            chosen = graph.call_function(aten.index_select.default, (last.args[0], 1, rows))
        last.replace_all_uses_with(chosen)
        graph.erase_node(last)
    for start in [node for node in rows.users if node.target is operator.neg]:
        graph.erase_node(start)
    if not cuts:
        outputs[logits] = graph.call_function(aten.index_select.default, (outputs[logits], 1, rows))


def _plain(graph: fx.Graph) -> fx.Graph:
    """The graph with references and plain functions in the place of dialect operators."""
    plain: dict[Any, Any] = {op.overload: op.reference for op in OPS.values()} | PLAIN
    for node in graph.nodes:
        if node.op == "call_function" and node.target in plain:
            node.target = plain[node.target]
    graph.lint()
    return graph
