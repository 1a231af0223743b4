"""The weights of a .pt2: raw bytes in one member, mapped into memory by whoever loads it.

`weights.txt` is for readers without a JSON parser: one constant a line, tab separated.

    tensor <constant> <dtype> <offset in weights.bin> <extents, blank separated>
    state <constant> <dtype> <fill> <extents>
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import ArtifactError
from rewriter.export.pt2_archive import WEIGHTS, Pt2File

__all__ = ["Layout", "index_text", "layout", "map_weights", "raw_bytes"]

_ALIGN, _CHUNK = 64, 2**24

Layout = dict[str, dict[str, Any]]
"""By tensor: `dtype`, `dims` and `offset` in `weights.bin`, as JSON has them."""


def layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Where each contiguous tensor goes."""
    placed: Layout = {}
    offset = 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        placed[name] = {"dtype": dtype, "dims": list(tensor.shape), "offset": offset}
        offset += -(-tensor.nbytes // _ALIGN) * _ALIGN
    return placed


def raw_bytes(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of `weights.bin` in order, a part at a time."""
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _CHUNK):
            yield flat[start : start + _CHUNK].numpy().data
        yield memoryview(bytes(-tensor.nbytes % _ALIGN))


def index_text(
    placed: Layout, aliases: Mapping[str, str], states: Mapping[str, tuple[str, float, list[int]]]
) -> str:
    """`weights.txt`. aliases: constant to the tensor it is. states: dtype, fill and extents."""
    lines = []
    for constant, name in aliases.items():
        spec = placed[name]
        lines.append(("tensor", constant, spec["dtype"], spec["offset"], _blanks(spec["dims"])))
    for constant, (dtype, fill, dims) in states.items():
        lines.append(("state", constant, dtype, fill, _blanks(dims)))
    return "".join("\t".join(map(str, line)) + "\n" for line in lines)


def _blanks(dims: list[int]) -> str:
    return " ".join(map(str, dims))


def map_weights(file: Pt2File) -> dict[str, Tensor]:
    """The tensors of an artifact over its own bytes: read when touched; what is written stays private.

    Raises:
        ArtifactError: a tensor that lies outside of the member.
    """
    start, size = file.places[WEIGHTS]
    placed = file.metadata["weights"]
    if size == 0:
        return {name: _mapped(name, spec, None, 0, 0) for name, spec in placed.items()}
    page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with file.path.open("rb") as raw:
        memory = mmap.mmap(raw.fileno(), start - page + size, access=mmap.ACCESS_COPY, offset=page)
    return {n: _mapped(n, spec, memory, start - page, size) for n, spec in placed.items()}


def _mapped(
    name: str, spec: dict[str, Any], memory: mmap.mmap | None, start: int, size: int
) -> Tensor:
    dtype, dims, offset = getattr(torch, str(spec["dtype"]), None), spec["dims"], spec["offset"]
    if not isinstance(dtype, torch.dtype) or not all(isinstance(n, int) and n >= 0 for n in dims):
        raise ArtifactError(f"tensor {name!r} is {spec['dtype']} {dims}")
    count = math.prod(dims)
    nbytes = count * dtype.itemsize
    if not isinstance(offset, int) or offset % _ALIGN or not 0 <= offset <= size - nbytes:
        raise ArtifactError(f"tensor {name!r} lies outside of {WEIGHTS}")
    if count == 0 or memory is None:
        return torch.empty(dims, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start + offset).view(dims)
