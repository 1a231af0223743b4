"""How every operator of the dialect is written in ONNX: PyTorch functions that call ONNX operators.

They are traced, never run. An operator that is not in `FUNCTIONS` is written as its plain reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from codegen.onnx_functions.attention import attention
from codegen.onnx_functions.mlp import gated_mlp, linear, mlp
from codegen.onnx_functions.moe import moe
from codegen.onnx_functions.norm import layer_norm, rms_norm
from codegen.onnx_functions.rope import rope

__all__ = ["FUNCTIONS"]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "gated_mlp": gated_mlp,
    "grouped_attention": attention,
    "layer_norm": layer_norm,
    "linear": linear,
    "mlp": mlp,
    "moe": moe,
    "rms_norm": rms_norm,
    "rope": rope,
}
"""By the name of the dialect operator, with its arguments."""
