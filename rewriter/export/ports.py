"""The inputs and outputs of an exported program: names, dtypes and dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewriter.program import Decoding, StateSpec

__all__ = ["Port", "StatePorts", "needs_mask", "needs_positions", "state_ports"]

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
