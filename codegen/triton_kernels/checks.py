"""What launchers and `supports` ask of dtypes and shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codegen.kernel import KernelDescription, dtype_name
from rewriter.errors import InputError

__all__ = ["FLOATS", "float_refusal", "one_of", "rows_of", "same_dtype"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def one_of(field: str, value: object, allowed: Sequence[object]) -> str | None:
    """Why a field's value is not allowed, or None."""
    if value in allowed:
        return None
    names = (dtype_name(a) if isinstance(a, torch.dtype) else repr(a) for a in allowed)
    shown = dtype_name(value) if isinstance(value, torch.dtype) else repr(value)
    return f"{field}={shown}, allowed: {', '.join(names)}"


def float_refusal(description: KernelDescription) -> str | None:
    """Why the activations' dtype is not one that kernels take, or None."""
    return one_of("dtype", description.dtype, FLOATS)


def rows_of(name: str, tensor: Tensor) -> tuple[int, int]:
    """The shape of a matrix whose columns are contiguous. Raises InputError."""
    if tensor.dim() != 2:
        raise InputError(f"{name}: {tensor.dim()} dimensions where 2 are expected")
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise InputError(f"{name}: columns are {tensor.stride(1)} elements apart, not 1")
    return tensor.shape[0], tensor.shape[1]


def same_dtype(name: str, tensor: Tensor, other: Tensor) -> None:
    """Raises InputError unless both tensors have one dtype."""
    if tensor.dtype != other.dtype:
        raise InputError(f"{name}: {dtype_name(tensor.dtype)} beside {dtype_name(other.dtype)}")
