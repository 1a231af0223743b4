"""Feed-forward blocks as products, for which ONNX has no operator of their own."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from rewriter.dialect.mlp import ACTIVATIONS

__all__ = ["gated_mlp", "linear", "mlp"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias."""
    return functional.linear(x, weight, bias)


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """`rewriter::gated_mlp`."""
    gated = ACTIVATIONS[activation](linear(x, gate, gate_bias))
    return linear(gated * linear(x, up, up_bias), down, down_bias)


def mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """`rewriter::mlp`."""
    return linear(ACTIVATIONS[activation](linear(x, up, up_bias)), down, down_bias)
