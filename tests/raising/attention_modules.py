"""Attentions in many spellings, as modules of (q, k, v) [batch_size, seq, num_heads · head_dim]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.capture import capture
from rewriter.program import Program

HEADS, WIDTH = 4, 8

Mask = Callable[[int], Tensor]
"""From a length to a bool mask [n, n], True where visible."""


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """bsd to bhsd."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """bhsd to bsd."""
    return x.transpose(1, 2).flatten(2)


def grid(n: int) -> tuple[Tensor, Tensor]:
    """Query positions as a column and key positions as a row."""
    positions = torch.arange(n)
    return positions[:, None], positions[None, :]


def causal(n: int) -> Tensor:
    """j <= i."""
    i, j = grid(n)
    return j <= i


class Explicit(nn.Module):
    """softmax(QKᵀ)V with a mask filled in."""

    def __init__(self, mask: Mask = causal, scale: float = 0.3) -> None:
        super().__init__()
        self.mask, self.scale = mask, scale

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled products [batch_size, num_heads, q_len, kv_len]."""
        return heads(q) @ heads(k).transpose(-1, -2) * self.scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bsd."""
        scores = self.scores(q, k).masked_fill(~self.mask(q.shape[1]), -torch.inf)
        return merge(scores.softmax(-1) @ heads(v))


class Additive(Explicit):
    """The mask is added as a very negative finite number."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bsd."""
        low = torch.finfo(q.dtype).min
        added = torch.where(self.mask(q.shape[1]), 0.0, low)[None, None]
        return merge((self.scores(q, k) + added).softmax(-1) @ heads(v))


class Fused(Explicit):
    """scaled_dot_product_attention with a bool mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bsd."""
        mask = self.mask(q.shape[1])
        out = functional.scaled_dot_product_attention(
            heads(q), heads(k), heads(v), attn_mask=mask, scale=self.scale
        )
        return merge(out)


class Flattened(Explicit):
    """baddbmm over batch · heads, as older models do, with ALiBi as its first operand."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bsd."""
        batch, n, _ = q.shape
        slopes = torch.pow(0.5, torch.arange(1, HEADS + 1))
        alibi = (slopes[:, None, None] * torch.arange(n)).repeat(batch, 1, 1)
        flat = (x.reshape(batch * HEADS, n, WIDTH) for x in (heads(q), heads(k), heads(v)))
        q, k, v = flat
        scores = torch.baddbmm(alibi, q, k.transpose(1, 2), beta=1.0, alpha=self.scale)
        scores = scores.view(batch, HEADS, n, n).masked_fill(~self.mask(n), -1e9)
        out = torch.bmm(scores.softmax(-1).view(batch * HEADS, n, n), v)
        return merge(out.view(batch, HEADS, n, WIDTH))


class Einsum(Explicit):
    """Products spelled as einsums of bshd tensors."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bsd."""
        q, k, v = (x.unflatten(-1, (HEADS, -1)) for x in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q * self.scale, k)
        weights = scores.masked_fill(~self.mask(q.shape[1]), -1e9).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


class Softcapped(Explicit):
    """cap · tanh(scores / cap) before the mask."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Capped at 5."""
        return 5.0 * torch.tanh(super().scores(q, k) / 5.0)


class Sinks(Explicit):
    """A learned logit per head takes part in the softmax, whose column is then dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bsd."""
        scores = self.scores(q, k).masked_fill(~self.mask(q.shape[1]), -torch.inf)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return merge(scores.softmax(-1)[..., :-1] @ heads(v))


class Grouped(Explicit):
    """Two key-value heads, repeated by `repeat` before a plain attention."""

    def __init__(self, repeat: Callable[[Tensor], Tensor]) -> None:
        super().__init__(scale=1.0 / math.sqrt(WIDTH))
        self.repeat = repeat

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bsd; k and v have half of q's width."""
        k, v = self.repeat(heads(k, 2)), self.repeat(heads(v, 2))
        return merge(functional.scaled_dot_product_attention(heads(q), k, v, is_causal=True))


class Bias(Explicit):
    """A learned bias per head and distance, like T5's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, HEADS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bsd."""
        i, j = grid(q.shape[1])
        bias = self.table((j - i).clamp(-15, 16) + 15).permute(2, 0, 1)[None]
        return merge((self.scores(q, k) + bias).softmax(-1) @ heads(v))


class OneInput(nn.Module):
    """A module of (q, k, v) as one of their concatenation: lengths are equal by construction."""

    def __init__(self, module: nn.Module, kv_width: int) -> None:
        super().__init__()
        self.module, self.kv_width = module, kv_width

    def forward(self, x: Tensor) -> Tensor:
        """bsd."""
        return self.module(*x.split([HEADS * WIDTH, self.kv_width, self.kv_width], dim=-1))


def packed(batch_size: int, n: int, kv_width: int = HEADS * WIDTH) -> Tensor:
    """Random q, k and v side by side."""
    return torch.randn(batch_size, n, HEADS * WIDTH + 2 * kv_width)


def traced(module: nn.Module, kv_width: int = HEADS * WIDTH) -> Program:
    """The module captured with dynamic batch and length, as a function of x = (q, k, v)."""
    return capture(OneInput(module, kv_width), (packed(2, 7, kv_width),))
