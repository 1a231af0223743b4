"""The semantic operators a graph is raised to: `torch.library` ops in namespace `rewriter`."""

from rewriter.dialect.attention import attention
from rewriter.dialect.grouped import grouped_attention
from rewriter.dialect.int8 import dequantize_rows, int8_embedding
from rewriter.dialect.kv import kv_append
from rewriter.dialect.linear import int8_linear, linear
from rewriter.dialect.mlp import gated_mlp, mlp
from rewriter.dialect.moe import moe
from rewriter.dialect.norm import layer_norm, rms_norm
from rewriter.dialect.random_entries import random_entries
from rewriter.dialect.registry import OPS, DialectOp, dialect_op
from rewriter.dialect.rope import rope
from rewriter.dialect.streaming import streaming_attention, streaming_entries

__all__ = [
    "OPS",
    "DialectOp",
    "attention",
    "dequantize_rows",
    "dialect_op",
    "gated_mlp",
    "grouped_attention",
    "int8_embedding",
    "int8_linear",
    "kv_append",
    "layer_norm",
    "linear",
    "mlp",
    "moe",
    "random_entries",
    "rms_norm",
    "rope",
    "streaming_attention",
    "streaming_entries",
]
