"""Which dimensions of the inputs stayed dynamic, under which names, and why others were fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewriter.program import BakedDim, Dim, InputSpec

__all__ = ["Described", "Wanted", "describe_inputs", "dynamic_dims"]

Wanted = dict[str, tuple[int, ...]]
"""For each input the dimensions that capture asks to keep dynamic."""


@dataclass
class Described:
    """The inputs of a traced graph."""

    inputs: list[InputSpec] = field(default_factory=list)
    baked: list[BakedDim] = field(default_factory=list)


def dynamic_dims(tensors: Mapping[str, Tensor], axes: tuple[str, ...]) -> Wanted:
    """The batch and sequence dimensions of each input, as far as `axes` asks for them.

    Dimension 0 is the batch; dimension 1 the sequence, except in images (four dimensions). A
    tensor [batch, 1 or heads, seq, seq] whose last size is another input's sequence is a mask.
    """
    lengths = {str(t.shape[1]) for t in tensors.values() if t.dim() in (2, 3)}
    wanted: Wanted = {}
    for name, tensor in tensors.items():
        sequence = {2: (1,), 3: (1,)}.get(tensor.dim(), ())
        if tensor.dim() == 4 and str(tensor.shape[-1]) in lengths:
            sequence = (2, 3)
        batch = (0,) if tensor.dim() else ()
        wanted[name] = (batch if "batch" in axes else ()) + (sequence if "seq" in axes else ())
    return wanted


def describe_inputs(
    values: Mapping[str, Tensor], asked: Wanted, wanted: Wanted, reason: str
) -> Described:
    """Name the dimensions of a traced graph's inputs and list the ones that got fixed.

    Args:
        values: the fake tensors of the graph's inputs by name.
        asked: dimensions that could have been dynamic; `wanted`: those this trace asked for.
        reason: why the difference was not asked for.
    """
    described, names = Described(), {}
    for name, value in values.items():
        dims: list[Dim] = []
        for dim, size in enumerate(value.shape):
            fixed = _fixed(size)
            if fixed is None:
                dims.append(_dim_name(size, dim, name, names))
                continue
            dims.append(fixed)
            why = _why(name, dim, fixed, value, asked, wanted) or reason
            described.baked.append(BakedDim(name, dim, fixed, why))
        described.inputs.append(InputSpec(name, value.dtype, tuple(dims)))
    return described


def _fixed(size: int | torch.SymInt) -> int | None:
    """The size a dimension was fixed at, also where its symbol was fixed later; None if dynamic."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else int(size)


def _dim_name(size: Any, dim: int, tensor: str, names: dict[str, str]) -> str:
    """`batch`, `seq` or `dim2`; equal sizes share a name, different ones never do."""
    key = str(size.node.expr)
    if key not in names:
        plain = {0: "batch", 1: "seq"}.get(dim, f"dim{dim}")
        names[key] = plain if plain not in names.values() else f"{plain}_{tensor}"
    return names[key]


def _why(name: str, dim: int, size: int, value: Tensor, asked: Wanted, wanted: Wanted) -> str:
    """Why one dimension is fixed; '' when it was asked for in an attempt that failed."""
    if dim not in asked.get(name, ()):
        return "neither batch nor sequence: kept as in the example inputs"
    if dim not in wanted.get(name, ()):
        return ""
    if size in (0, 1):
        return f"size {size} in the example inputs"
    return _specialized_at(name, dim, value) or "the model works for this size only"


def _specialized_at(name: str, dim: int, value: Tensor) -> str:
    """The line of the model that fixed a size, where torch.export recorded it."""
    environment = getattr(getattr(value, "fake_mode", None), "shape_env", None)
    sources = getattr(environment, "var_to_sources", {})
    locations = getattr(environment, "replacements_slocs", {})
    for symbol, found in sources.items():
        names = [source.name for source in found]
        frame = getattr(locations.get(symbol), "framework_loc", None)
        if frame is not None and f"L['{name}'].size()[{dim}]" in names:
            file = "/".join(frame.filename.split("/")[-2:])
            return f"fixed by the model at {file}:{frame.lineno} in {frame.name}: {frame.line}"
    return ""
