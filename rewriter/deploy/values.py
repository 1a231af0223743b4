"""Tensors of the runtime: made, enlarged and read, bfloat16 too, which NumPy does not have."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

__all__ = ["enlarged", "filled", "read"]

BFLOAT16 = 16
"""Number of the type in ONNX."""


def filled(shape: Sequence[int], dtype: str, fill: float, device: str = "cpu") -> OrtValue:
    """A tensor of one value."""
    return _value(_array(shape, dtype, fill), dtype, device)


def enlarged(
    old: OrtValue, shape: Sequence[int], dtype: str, fill: float, device: str = "cpu"
) -> OrtValue:
    """A tensor of one value that starts with the content of a smaller one."""
    content, array = read(old), _array(shape, dtype, fill)
    array[tuple(slice(extent) for extent in content.shape)] = content
    return _value(array, dtype, device)


def read(value: OrtValue) -> NDArray[Any]:
    """A copy of its content; bfloat16 as bits."""
    if value.element_type() != BFLOAT16:
        return np.array(value.numpy())
    here = _moved(value, "cpu")
    shape = here.shape()
    content = (ctypes.c_uint16 * int(np.prod(shape))).from_address(here.data_ptr())
    return np.array(content, np.uint16).reshape(shape)


def _array(shape: Sequence[int], dtype: str, fill: float) -> NDArray[Any]:
    bits = dtype == "bfloat16"
    array = np.zeros(shape, np.uint16 if bits else dtype)  # costs nothing until it is written
    if fill:
        array.fill(int(np.float32(fill).view(np.uint32)) >> 16 if bits else fill)
    return array


def _value(array: NDArray[Any], dtype: str, device: str) -> OrtValue:
    if dtype != "bfloat16":
        return OrtValue.ortvalue_from_numpy(array, device)
    value = OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return value if device == "cpu" else _moved(value, device)


def _moved(value: OrtValue, device: str) -> OrtValue:
    kind = value.element_type()
    copy = OrtValue.ortvalue_from_shape_and_type(value.shape(), kind, device)
    copy.update_inplace(value)
    return copy
