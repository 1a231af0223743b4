"""Causal attention for training on processors: torch's forward pass, a backward pass of matrix products.

The backward pass of torch's CPU kernel takes four times as long where the processor has bf16 matrix
products. Here scores are computed again, tile by tile, from the log-sum-exp that the forward pass leaves,
as in FlashAttention-2: https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

__all__ = ["score_grads", "tiled_attention", "use_tiled_attention"]

TILE = 256
"""Queries of a tile: its scores on 2,000 keys stay near the processor."""


def use_tiled_attention(model: Any) -> None:
    """Train a model of transformers with it: no mask, no dropout, rows must be full."""
    AttentionInterface.register("tiled", _attend)
    AttentionMaskInterface.register("tiled", lambda *_, **__: None)
    model.set_attn_implementation("tiled")


def _attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    scaling: float,
    **__: Any,
) -> tuple[Tensor, None]:
    """Layout `bhsd` in, `bshd` out; rotation is in fp32, products are in the dtype of the values."""
    out, _lse = tiled_attention(query.to(value.dtype), key.to(value.dtype), value, scaling)
    return out.transpose(1, 2), None


@torch.library.custom_op("reference_models::tiled_attention", mutates_args=())
def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q @ k.T, causal) @ v in layout `bhsd`, and lse [batch, heads, seq] in fp32.

    There may be fewer KV heads than query heads.
    """
    group_size = query.shape[1] // key.shape[1]
    heads = (x.repeat_interleave(group_size, 1) for x in (key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(query, *heads, 0.0, True, scale=scale)
    return out.contiguous(), lse.contiguous()


@tiled_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("reference_models::tiled_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, num_heads, seq, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = (batch_size * kv_heads, num_heads // kv_heads)
    delta = (grad.float() * out.float()).sum(-1)
    query, grad, lse, delta = (x.reshape(*groups, seq, -1) for x in (query, grad, lse, delta))
    key, value = (x.reshape(groups[0], seq, head_dim) for x in (key, value))
    dq = torch.empty_like(query)
    dk, dv = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
    for start in range(0, seq, TILE):
        rows, stop = slice(start, start + TILE), min(start + TILE, seq)
        q, g, tile_lse, tile_delta = (
            x[:, :, rows].flatten(1, 2) for x in (query, grad, lse, delta)
        )
        k, v = key[:, :stop], value[:, :stop]
        p, ds = score_grads(q @ k.mT, g @ v.mT, tile_lse, tile_delta, scale)
        for x in (p, ds):
            x.view(*groups, stop - start, stop)[..., start:].tril_()
        dq[:, :, rows] = (ds @ k).view(*groups, stop - start, head_dim)
        dk[:, :stop] += ds.mT @ q
        dv[:, :stop] += p.mT @ g
    kv = (batch_size, kv_heads, seq, head_dim)
    shaped = (x.to(key.dtype).view(kv) for x in (dk, dv))
    return dq.view(batch_size, num_heads, seq, head_dim), *shaped


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    return q, k, v


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.scale = inputs[3]


def _differentiate(ctx: Any, grad: Tensor, _lse: None) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None


tiled_attention.register_autograd(_differentiate, setup_context=_save)


def score_grads(
    scores: Tensor, dprobabilities: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Probabilities and gradients of the scores, [n, rows, kv_len], before the causal mask."""
    p = torch.exp(scores.float() * scale - lse)
    ds = p * (dprobabilities.float() - delta) * scale
    return p.to(scores.dtype), ds.to(scores.dtype)
