"""Small modules, each with one property that capture has to deal with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Tokens [batch, seq, 8] to a dict; takes a scale that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.dropout = nn.Dropout(0.5)
        self.outer = nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> dict:
        hidden = self.dropout(torch.relu(self.inner(x))) * scale
        hidden = hidden if shift is None else hidden + shift
        return {"logits": self.outer(hidden), "mean": hidden.mean(1)}


class Convolution(nn.Module):
    """An image model with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.convolution(image)).mean((2, 3))


class Unrolled(nn.Module):
    """A loop over the sequence: its length gets baked in."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            total = total * 0.5 + x[:, step]
        return total


class ShortOnly(nn.Module):
    """Takes another branch from 16 tokens on."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] < 16 else x * 3


class DataDependent(nn.Module):
    """Branches on values, which no trace can follow."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class Counter(nn.Module):
    """Writes a buffer at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


class Nested(nn.Module):
    """A tuple inside a dict inside the arguments."""

    def forward(self, batch: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        first, second = batch["pair"]
        return first + second, first - second


def make_classifier() -> nn.Module:
    """A factory that brings example inputs along."""
    return Classifier(), (torch.randn(2, 5, 8),)


def make_plain() -> nn.Module:
    """A factory that does not."""
    return Convolution()


def make_nothing() -> int:
    """Not a factory of models."""
    return 3


def make_failing() -> nn.Module:
    """A factory that fails."""
    raise RuntimeError("no weights\nsecond line")
