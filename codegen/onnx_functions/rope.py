"""Rotary position embedding as ONNX's RotaryEmbedding."""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.onnx_functions.node import node
from rewriter.dialect import OPS

__all__ = ["rope", "rope_by_table", "turn"]


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """`rewriter::rope`; as operators of its own where x is not bhsd with one table for all heads."""
    if x.dim() != 4 or cos.dim() != 4 or cos.shape[1] != 1:
        return OPS["rope"].reference(x, cos, sin, interleaved=interleaved)
    return turn(x, cos.squeeze(1), sin.squeeze(1), None, interleaved=interleaved)


def rope_by_table(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool
) -> Tensor:
    """`rewriter::rope` at `positions` int64 [batch_size, seq] of tables [positions, rotary_dim / 2]."""
    return turn(x, cos, sin, positions, interleaved=interleaved)


def turn(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *, interleaved: bool
) -> Tensor:
    """x bhsd turned; tables [batch_size or 1, seq, width], or [rows, width] read at `positions`."""
    wide = torch.promote_types(x.dtype, cos.dtype)
    if positions is None:
        cos, sin = (t.expand(x.shape[0], -1, -1) for t in (cos, sin))
    partial = 2 * cos.shape[-1] if 2 * cos.shape[-1] != x.shape[-1] else 0
    tables = (cos.to(wide), sin.to(wide))
    inputs = (x.to(wide), *tables) if positions is None else (x.to(wide), *tables, positions)
    out = node(
        "RotaryEmbedding",
        inputs,
        x.shape,
        wide,
        interleaved=int(interleaved),
        rotary_embedding_dim=partial,
        num_heads=x.shape[1],
    )
    return out.to(x.dtype)
