"""Mixture of experts: every token through its own few feed-forward blocks, weighted and summed.

Routing is not part of it: which experts, and with what weights, are inputs.
Source: https://arxiv.org/abs/1701.06538
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.cost.cost import Cost
from rewriter.dialect.mlp import ACTIVATIONS
from rewriter.dialect.registry import dialect_op, nbytes

__all__ = ["GATINGS", "gate", "moe"]

GATINGS = ("none", "halves", "pairs")
"""How the up projection's output is read: all activated, [gate, up], or gate and up alternating."""

_SWIGLU_SLOPE = 1.702


def gate(x: Tensor, activation: str, gating: str, limit: float = 0.0) -> Tensor:
    """What an expert computes between its projections; the arguments of `moe`.

    Args:
        x: [..., 2 · intermediate_size], or [..., intermediate_size] without gating.
    """
    if gating == "none":
        return ACTIVATIONS[activation](x)
    halves = (x[..., 0::2], x[..., 1::2]) if gating == "pairs" else x.chunk(2, dim=-1)
    gated, up = halves
    if limit:
        gated, up = gated.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gated * torch.sigmoid(gated * _SWIGLU_SLOPE))
    return ACTIVATIONS[activation](gated) * up


def _fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _cost(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    up: Tensor,
    down: Tensor,
    *biases: Tensor | None,
    **_: object,
) -> Cost:
    pairs, experts = expert_index.numel(), up.shape[0]
    share = min(pairs, experts) / experts
    flops = 2.0 * pairs * (up.numel() + down.numel()) / experts
    return Cost(flops, 2 * nbytes(x) + share * nbytes(up, down, *biases), 2 * experts)


@dialect_op(
    "moe(Tensor x, Tensor expert_index, Tensor expert_weight, Tensor up, Tensor down,"
    " Tensor? up_bias=None, Tensor? down_bias=None, *, str activation, str gating,"
    " bool transposed=False, float limit=0.0) -> Tensor",
    fake=_fake,
    cost=_cost,
    traceable=False,
)
def moe(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    gating: str,
    transposed: bool = False,
    limit: float = 0.0,
) -> Tensor:
    """Σ over a token's experts e of weight · down_e(gate(up_e(x))); only chosen experts run.

    Args:
        x: [tokens, hidden_size];
        expert_index (int64), expert_weight: [tokens, experts per token].
        up: [experts, 2 · intermediate_size or intermediate_size, hidden_size];
        down: [experts, hidden_size, intermediate_size];
        transposed: the last two dimensions of both are swapped.
        up_bias, down_bias: [experts, out].
        activation: a key of `ACTIVATIONS`; gating: one of `GATINGS`.
        limit: not 0 for the clamped form (up + 1) · g · sigmoid(1.702 g), without activation.
    """
    if not transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    experts = expert_index.flatten()
    order = torch.argsort(experts, stable=True)
    tokens = x[order // expert_index.shape[1]]
    out = torch.empty_like(tokens)
    start = 0
    for expert, count in enumerate(torch.bincount(experts, minlength=up.shape[0]).tolist()):
        if count:
            rows = slice(start, start + count)
            inner = tokens[rows] @ up[expert]
            inner = inner if up_bias is None else inner + up_bias[expert]
            result = gate(inner, activation, gating, limit) @ down[expert]
            out[rows] = result if down_bias is None else result + down_bias[expert]
            start += count
    weighted = out * expert_weight.flatten()[order].unsqueeze(-1)
    restored = torch.empty_like(weighted).index_copy_(0, order, weighted)
    return restored.view(*expert_index.shape, -1).sum(dim=1).to(x.dtype)
