"""Tensors of a step: a place in memory with a shape and strides, and views of it that move nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from codegen.step.extent import Extent, plus, times

__all__ = ["CPP_TYPES", "Place", "Refusal", "Value", "contiguous_strides"]

CPP_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "rw::bf16",
    torch.int64: "int64_t",
    torch.int8: "int8_t",
    torch.bool: "bool",
}
"""Elements that the step reads or writes where they lie."""


class Refusal(Exception):
    """An operator, or a form of one, that has no C++: PyTorch runs it. Says why."""


@dataclass(frozen=True)
class Place:
    """Memory: floats of the arena from `offset` on, or what the pointer `slot` points to."""

    slot: int | None
    offset: int = 0
    element: str = "float"

    def pointer(self, constant: bool) -> str:
        """The C++ expression of its address."""
        if self.slot is None:
            return f"arena + {self.offset}"
        return f"({'const ' if constant else ''}{self.element}*)pointers[{self.slot}]"


@dataclass(frozen=True)
class Value:
    """A strided tensor.

    Attributes:
        dtype: what the graph says. In the arena everything lies as fp32, rounded to this dtype.
        start: of its first element, in elements from the place's address.
    """

    place: Place
    shape: tuple[Extent, ...]
    strides: tuple[Extent, ...]
    dtype: torch.dtype
    start: Extent = 0

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape, where it does not grow. Raises Refusal."""
        fixed = tuple(extent for extent in self.shape if isinstance(extent, int))
        if len(fixed) != len(self.shape):
            raise Refusal(f"a shape that grows: {list(self.shape)}")
        return fixed

    @property
    def is_contiguous(self) -> bool:
        """Whether elements lie in row-major order, extents of 1 aside."""
        expected: Extent = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return False
            expected = times(expected, extent)
        return True

    def transposed(self, a: int, b: int) -> Value:
        """Two dimensions exchanged."""
        order = list(range(len(self.shape)))
        order[a], order[b] = order[b], order[a]
        return self.permuted(order)

    def permuted(self, order: Sequence[int]) -> Value:
        """Dimensions in another order."""
        shape = tuple(self.shape[i] for i in order)
        return replace(self, shape=shape, strides=tuple(self.strides[i] for i in order))

    def unsqueezed(self, dim: int) -> Value:
        """A dimension of 1 put before `dim`."""
        at = dim % (len(self.shape) + 1)
        shape = (*self.shape[:at], 1, *self.shape[at:])
        return replace(self, shape=shape, strides=(*self.strides[:at], 0, *self.strides[at:]))

    def squeezed(self, dims: Sequence[int]) -> Value:
        """Those of `dims` that are 1 left out."""
        gone = {d % len(self.shape) for d in dims}
        kept = [i for i in range(len(self.shape)) if i not in gone or self.shape[i] != 1]
        return self.permuted(kept)

    def sliced(self, dim: int, start: Extent, length: Extent, step: int = 1) -> Value:
        """`length` entries of a dimension from `start` on."""
        dim %= len(self.shape)
        moved = plus(self.start, times(start, self.strides[dim]))
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        stride = times(self.strides[dim], step)
        strides = (*self.strides[:dim], stride, *self.strides[dim + 1 :])
        return replace(self, shape=shape, strides=strides, start=moved)

    def selected(self, dim: int, index: Extent) -> Value:
        """One entry of a dimension, which is left out."""
        one = self.sliced(dim, index, 1)
        return one.permuted([i for i in range(len(self.shape)) if i != dim % len(self.shape)])

    def expanded(self, shape: Sequence[Extent]) -> Value:
        """Dimensions of 1 repeated without copies."""
        lead = len(shape) - len(self.shape)
        own = ((1,) * lead + self.shape, (0,) * lead + self.strides)
        strides = tuple(
            stride if have == want else 0 for want, have, stride in zip(shape, *own, strict=True)
        )
        return replace(self, shape=tuple(shape), strides=strides)

    def reshaped(self, shape: tuple[int, ...]) -> Value | None:
        """Another shape over the same memory, or None where that would need a copy."""
        if self.shape == shape:
            return self
        own = [(e, s) for e, s in zip(self.fixed_shape, self.strides, strict=True) if e != 1]
        strides: list[Extent] = []
        left = (
            1  # extent of the current run of own dimensions that is not used up, from the last on
        )
        stride: Extent = 1
        for extent in reversed(shape):
            if extent == 1:
                strides.append(0)
                continue
            while left % extent:
                if not own:
                    return None
                more, step = own.pop()
                if left != 1 and step != times(stride, left):
                    return None
                if left == 1:
                    stride = step
                left *= more
            strides.append(stride)
            left //= extent
            stride = times(stride, extent)
        return replace(self, shape=shape, strides=tuple(reversed(strides)))


def contiguous_strides(shape: Sequence[Extent]) -> tuple[Extent, ...]:
    """Of a row-major tensor."""
    strides: list[Extent] = []
    step: Extent = 1
    for extent in reversed(shape):
        strides.append(step)
        step = times(step, extent)
    return tuple(reversed(strides))
