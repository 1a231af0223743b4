"""Muon in fp32: momentum made orthogonal, for the matrices of a model.

torch.optim.Muon iterates in bf16, which processors without bf16 products run ten times slower.
Source: https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """`w -= lr * sqrt(max(1, rows / columns)) * orthogonal(nesterov momentum)`."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Matrices of one shape are made orthogonal in one batch."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for weight in group["params"]:
                shapes[weight.shape].append(weight)
            for weights in shapes.values():
                self._update(weights, group)

    def _update(self, weights: list[nn.Parameter], group: dict) -> None:
        directions = orthogonal(torch.stack([self._momentum(w, group) for w in weights]))
        rows, columns = weights[0].shape
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        for weight, direction in zip(weights, directions, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(direction, alpha=scale)

    def _momentum(self, weight: nn.Parameter, group: dict) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
        return weight.grad.lerp(state["momentum"], group["momentum"])


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrix [..., rows, columns] with singular values of about 1 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if wide else x
