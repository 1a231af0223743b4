"""Root-mean-square and layer normalisation as ONNX's own operators."""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.onnx_functions.node import node

__all__ = ["layer_norm", "rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    wide_weight: bool = False,
) -> Tensor:
    """`rewriter::rms_norm` as RMSNormalization, which computes in fp32 and casts before the weight."""
    scale = torch.ones(x.shape[-1], dtype=x.dtype) if weight is None else weight
    wide = weight is not None and x.dtype != torch.float32 and (weight_offset or wide_weight)
    wide = wide or scale.dtype != x.dtype
    scale = scale.float() if wide else scale
    scale = scale + weight_offset if weight_offset else scale
    value = x.float() if wide else x
    out = node(
        "RMSNormalization", (value, scale), x.shape, value.dtype, axis=-1, epsilon=eps, stash_type=1
    )
    return out.to(x.dtype) if wide else out


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """`rewriter::layer_norm` as LayerNormalization, which wants a weight."""
    scale = torch.ones(x.shape[-1], dtype=x.dtype) if weight is None else weight
    inputs = (x, scale) if bias is None else (x, scale, bias)
    return node("LayerNormalization", inputs, x.shape, x.dtype, axis=-1, epsilon=eps)
