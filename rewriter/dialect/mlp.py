"""Feed-forward blocks: plain and gated.

Sources: https://arxiv.org/abs/1706.03762, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.cost.cost import Cost
from rewriter.dialect.linear import linear
from rewriter.dialect.registry import dialect_op, nbytes

__all__ = ["ACTIVATIONS", "gated_mlp", "mlp"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x.clone(),
}
"""Activation by name; recognised by evaluation, so spelling does not matter."""


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _out(x: Tensor, down: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], down.shape[0]))


def _cost(x: Tensor, *weights: Tensor | None, activation: str) -> Cost:
    matrices = [w for w in weights if w is not None and w.dim() == 2]
    flops = 2.0 * _rows(x) * sum(w.numel() for w in matrices)
    return Cost(flops, 2 * nbytes(x) + nbytes(*weights), len(matrices))


def _fake_gated(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *_: object, activation: str
) -> Tensor:
    return _out(x, down)


@dialect_op(
    "gated_mlp(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias=None,"
    " Tensor? up_bias=None, Tensor? down_bias=None, *, str activation) -> Tensor",
    fake=_fake_gated,
    cost=_cost,
)
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
    """down(activation(gate(x)) · up(x)).

    Args:
        x: [..., hidden_size]; gate, up: [intermediate_size, hidden_size];
        down: [hidden_size, intermediate_size]; activation: a key of `ACTIVATIONS`.
    """
    gated = ACTIVATIONS[activation](linear(x, gate, gate_bias))
    return linear(gated * linear(x, up, up_bias), down, down_bias)


def _fake_mlp(x: Tensor, up: Tensor, down: Tensor, *_: object, activation: str) -> Tensor:
    return _out(x, down)


@dialect_op(
    "mlp(Tensor x, Tensor up, Tensor down, Tensor? up_bias=None, Tensor? down_bias=None,"
    " *, str activation) -> Tensor",
    fake=_fake_mlp,
    cost=_cost,
)
def mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """down(activation(up(x))); x [..., hidden_size], up [intermediate_size, hidden_size]."""
    return linear(ACTIVATIONS[activation](linear(x, up, up_bias)), down, down_bias)
