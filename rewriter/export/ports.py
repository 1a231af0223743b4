"""What an exported program takes and gives: names, dtypes and dimensions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rewriter.program import Decoding, StateSpec

__all__ = ["Functional", "Port", "StatePorts", "needs_mask", "needs_positions", "state_ports"]

Dim = int | str


@dataclass(frozen=True)
class Port:
    """One tensor that goes in or comes out; dimensions are extents or names of dynamic ones."""

    name: str
    dtype: torch.dtype
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class StatePorts:
    """A state of a program and the names it goes in and comes out by."""

    spec: StateSpec
    input: Port
    output: Port


@dataclass
class Functional:
    """A module without state and how it is called.

    Attributes:
        module: takes the inputs and gives the outputs, in order.
        states: of a program that decodes, else empty.
        decomposed: by dialect operator, why it is not one ONNX operator.
    """

    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[StatePorts, ...] = ()
    decomposed: dict[str, str] = field(default_factory=dict)
    padding: str = "any"
    max_positions: int | None = None
    examples: tuple[Tensor, ...] | None = None


def state_ports(decoding: Decoding) -> tuple[StatePorts, ...]:
    """In the order of the program's states."""
    return tuple(_ports(spec) for spec in decoding.states)


def needs_mask(decoding: Decoding) -> bool:
    """Whether some layer keeps every entry, padding among them."""
    return any(not spec.bounded for spec in decoding.states)


def needs_positions(decoding: Decoding) -> bool:
    """Whether some state does not grow: then true positions come from outside."""
    return any(spec.bounded for spec in decoding.states)


def _ports(spec: StateSpec) -> StatePorts:
    role = {"keys": "key", "values": "value"}.get(spec.role)
    if role is not None and spec.layer is not None:
        names = (f"past_key_values.{spec.layer}.{role}", f"present.{spec.layer}.{role}")
    else:
        names = (f"past.{spec.name}", f"present.{spec.name}")
    past = tuple("past" if dim == "capacity" else dim for dim in spec.dims)
    present = tuple("total" if dim == "capacity" else dim for dim in spec.dims)
    return StatePorts(spec, Port(names[0], spec.dtype, past), Port(names[1], spec.dtype, present))
