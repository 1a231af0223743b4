"""One ONNX operator inside a traced PyTorch graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["MICROSOFT", "OPSET", "node", "nodes"]

OPSET = 23
"""The first version with Attention, RMSNormalization and RotaryEmbedding."""
MICROSOFT = "com.microsoft"
"""Operators of ONNX Runtime that no standard has."""

Extents = Sequence[Any]


def node(
    name: str,
    inputs: Sequence[Tensor | None],
    shape: Extents,
    dtype: torch.dtype,
    **attributes: Any,
) -> Tensor:
    """A call of the operator `name` ("Attention", "com.microsoft::...") with one result.

    Args:
        shape, dtype: of the result, for tracing; nothing is computed.
        attributes: as the operator has them; None leaves one out.
    """
    given = {key: value for key, value in attributes.items() if value is not None}
    return torch.onnx.ops.symbolic(
        name, list(inputs), given, dtype=dtype, shape=list(shape), version=_version(name)
    )


def nodes(
    name: str,
    inputs: Sequence[Tensor | None],
    shapes: Sequence[Extents],
    dtypes: Sequence[torch.dtype],
    **attributes: Any,
) -> Sequence[Tensor]:
    """The same for an operator with several results."""
    given = {key: value for key, value in attributes.items() if value is not None}
    return torch.onnx.ops.symbolic_multi_out(
        name,
        list(inputs),
        given,
        dtypes=list(dtypes),
        shapes=[list(shape) for shape in shapes],
        version=_version(name),
    )


def _version(name: str) -> int:
    return 1 if "::" in name else OPSET
