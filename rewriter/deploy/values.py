"""Tensors of the runtime: made, moved and read, bfloat16 too, which NumPy does not have."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

__all__ = ["filled", "from_bits", "moved", "read"]

BFLOAT16 = 16
"""Number of the type in ONNX."""


def filled(shape: Sequence[int], dtype: str, fill: float, device: str = "cpu") -> OrtValue:
    """A tensor of one value."""
    if dtype == "bfloat16":
        bits = int(np.float32(fill).view(np.uint32)) >> 16
        return from_bits(np.full(shape, bits, np.uint16), device)
    values = np.zeros(shape, dtype)  # pages of zeros cost nothing until they are written
    if fill:
        values.fill(fill)
    return OrtValue.ortvalue_from_numpy(values, device)


def from_bits(bits: NDArray[np.uint16], device: str = "cpu") -> OrtValue:
    """A bfloat16 tensor."""
    value = OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)
    return value if device == "cpu" else moved(value, device)


def moved(value: OrtValue, device: str) -> OrtValue:
    """A copy on a device."""
    kind = value.element_type()
    copy = OrtValue.ortvalue_from_shape_and_type(value.shape(), kind, device)
    copy.update_inplace(value)
    return copy


def read(value: OrtValue) -> NDArray[Any]:
    """Its content; bfloat16 as bits."""
    if value.element_type() != BFLOAT16:
        return value.numpy()
    here = moved(value, "cpu")
    shape = here.shape()
    content = (ctypes.c_uint16 * int(np.prod(shape))).from_address(here.data_ptr())
    return np.array(content, np.uint16).reshape(shape)
