"""Every Triton kernel; `codegen.kernel.select` takes the first that supports a description."""

from __future__ import annotations

from codegen.kernel import Kernel
from codegen.triton_kernels.column_sums import COLUMN_SUMS
from codegen.triton_kernels.decode_attention import DECODE_ATTENTION
from codegen.triton_kernels.gated_activation import GATED_ACTIVATION
from codegen.triton_kernels.gathered_mlp import DOWN, SUM, UP
from codegen.triton_kernels.gemv import GEMV
from codegen.triton_kernels.lora import LORA_EXPAND, LORA_SHRINK
from codegen.triton_kernels.merge_lse import MERGE_LSE
from codegen.triton_kernels.page_scores import PAGE_SCORES
from codegen.triton_kernels.prefill_attention import PREFILL_ATTENTION
from codegen.triton_kernels.rms_norm import RMS_NORM
from codegen.triton_kernels.rotary_append import ROTARY_APPEND
from codegen.triton_kernels.shared_prefix import SHARED_PREFIX
from codegen.triton_kernels.token_merge import TOKEN_MERGE, TOKEN_SIMILARITY

__all__ = ["KERNELS"]

KERNELS: tuple[Kernel, ...] = (
    DECODE_ATTENTION,
    MERGE_LSE,
    PREFILL_ATTENTION,
    SHARED_PREFIX,
    PAGE_SCORES,
    COLUMN_SUMS,
    GEMV,
    UP,
    DOWN,
    SUM,
    RMS_NORM,
    ROTARY_APPEND,
    GATED_ACTIVATION,
    LORA_SHRINK,
    LORA_EXPAND,
    TOKEN_SIMILARITY,
    TOKEN_MERGE,
)
