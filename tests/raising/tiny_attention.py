"""A one-layer attention with a pluggable rotation, and how tests raise it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.capture.module import capture
from rewriter.program import Program
from rewriter.raising.attention import raise_attention
from rewriter.raising.norm import raise_norm
from rewriter.raising.normal_form import normalize

HEADS, HEAD_DIM, HIDDEN = 2, 8, 16

Rotation = Callable[[Tensor, Tensor], Tensor]
"""From bhsd queries or keys and positions [batch_size, seq] to the rotated ones."""


class TinyAttention(nn.Module):
    """Projections, a rotation of q and k, causal attention; called as (x, position_ids)."""

    def __init__(self, rotate: Rotation, *, layout: str = "bhsd") -> None:
        super().__init__()
        self.rotate, self.layout = rotate, layout
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        q, k, v = (self.heads(p(x)) for p in (self.query, self.key, self.value))
        q, k = self.rotate(q, position_ids), self.rotate(k, position_ids)
        if self.layout == "bshd":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def heads(self, x: Tensor) -> Tensor:
        x = x.view(*x.shape[:2], HEADS, HEAD_DIM)
        return x if self.layout == "bshd" else x.transpose(1, 2)


class TinyStack(nn.Module):
    """Several attentions on one x, because tracing is what takes time."""

    def __init__(self, *rotations: Rotation) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TinyAttention(rotate) for rotate in rotations)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x, position_ids) for layer in self.layers)


def inputs(batch_size: int = 2, seq: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seq)
    positions = torch.arange(seq).expand(batch_size, seq).contiguous()
    return {
        "x": torch.randn(batch_size, seq, HIDDEN, generator=generator),
        "position_ids": positions,
    }


def captured(model: nn.Module, example: dict[str, Tensor]) -> Program:
    """In normal form, with attentions and norms raised."""
    program = capture(model.eval(), example)
    normalize(program)
    raise_attention(program)
    normalize(program)
    raise_norm(program)
    return program


def same_outputs(program: Program, model: nn.Module, **values: Tensor) -> None:
    with torch.no_grad():
        expected = model(**values)
    expected = expected if isinstance(expected, tuple) else (expected,)
    torch.testing.assert_close(program(**values), expected, rtol=1e-5, atol=1e-5)
