"""StreamingLLM attention said slowly: one token at a time, a list of entries, rotated by rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["SlowStreaming", "rotate"]


def rotate(x: Tensor, rank: int, inv_freq: Tensor, *, interleaved: bool = False) -> Tensor:
    """x [heads, head_dim] turned by rank · inv_freq in its leading pairs, in float64."""
    half, angle = inv_freq.shape[0], rank * inv_freq
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + (1 if interleaved else half)
    out, a, b = x.double().clone(), x[:, first].double(), x[:, second].double()
    out[:, first] = a * angle.cos() - b * angle.sin()
    out[:, second] = b * angle.cos() + a * angle.sin()
    return out


@dataclass
class SlowStreaming:
    """One sequence, one layer. `kept` is a list of (position, key before rotation, value)."""

    num_sink_tokens: int
    recent_window: int
    inv_freq: Tensor | None
    softmax_scale: float
    interleaved: bool = False
    span: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    kept: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    position: int = 0

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [num_heads, head_dim], k and v [num_kv_heads, ...] of the next token: its output."""
        self.kept.append((self.position, k, v))
        if len(self.kept) > self.num_sink_tokens + self.recent_window:
            del self.kept[self.num_sink_tokens]
        self.position += 1
        rank = len(self.kept) - 1
        query = self._turn(q, rank)
        keys = [self._turn(key, place) for place, (_, key, _) in enumerate(self.kept)]
        return torch.stack([self._head(query, keys, head) for head in range(q.shape[0])])

    def _turn(self, x: Tensor, rank: int) -> Tensor:
        if self.inv_freq is None:
            return x.double()
        return rotate(x, rank, self.inv_freq, interleaved=self.interleaved)

    def _head(self, query: Tensor, keys: list[Tensor], head: int) -> Tensor:
        rank, kv_head = len(keys) - 1, head * keys[0].shape[0] // query.shape[0]
        logits, values = [], []
        for place, (_, _, value) in enumerate(self.kept):
            if self.span and rank - place >= self.span:
                continue
            logit = query[head] @ keys[place][kv_head] * self.softmax_scale
            if self.softcap:
                logit = self.softcap * torch.tanh(logit / self.softcap)
            if self.slopes is not None:
                logit = logit + float(self.slopes[head]) * (place - rank)
            logits.append(logit)
            values.append(value[kv_head].double())
        if self.sinks is not None:
            logits.append(self.sinks[head].double())
            values.append(torch.zeros_like(values[0]))
        return torch.softmax(torch.stack(logits), 0) @ torch.stack(values)
