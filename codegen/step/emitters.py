"""Which operators of a step have C++, and what writes it. One line an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from codegen.step.attention import emit_attention, emit_kv_append, emit_rope
from codegen.step.plan import Planner
from codegen.step.products import emit_dequantize_rows, emit_gated_mlp, emit_linear, emit_mlp
from codegen.step.streaming import emit_streaming_attention
from codegen.step.tables import (
    emit_cat,
    emit_embedding,
    emit_int8_embedding,
    emit_layer_norm,
    emit_rms_norm,
)
from rewriter.dialect import OPS

__all__ = ["emitters"]

aten = torch.ops.aten

_ATEN = {
    aten.linear.default: emit_linear,
    aten.embedding.default: emit_embedding,
    aten.cat.default: emit_cat,
}
_DIALECT = {
    "attention": emit_attention,
    "dequantize_rows": emit_dequantize_rows,
    "gated_mlp": emit_gated_mlp,
    "grouped_attention": emit_attention,
    "int8_embedding": emit_int8_embedding,
    "kv_append": emit_kv_append,
    "layer_norm": emit_layer_norm,
    "linear": emit_linear,
    "mlp": emit_mlp,
    "rms_norm": emit_rms_norm,
    "rope": emit_rope,
    "streaming_attention": emit_streaming_attention,
}


def emitters() -> dict[Any, Callable[[Planner, fx.Node], Any]]:
    """By the target of a node."""
    return {**_ATEN, **{OPS[name].overload: emit for name, emit in _DIALECT.items()}}
