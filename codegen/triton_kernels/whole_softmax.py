"""Softmax over whole rows of scores in plain PyTorch: what references of attention kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.kernel import KernelDescription
from rewriter.dialect.attention import repeat_kv

__all__ = ["probabilities"]


def probabilities(
    description: KernelDescription, q: Tensor, k: Tensor, keep: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention probabilities and their lse, in fp32; zeros and -inf where nothing is seen.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim]; k: the same with num_kv_heads.
        keep: bool [batch_size, 1 or num_kv_heads or num_heads, q_len or 1, kv_len].

    Returns:
        fp32 [batch_size, num_heads, q_len, kv_len] and [batch_size, num_heads, q_len].
    """
    num_heads, softcap = q.shape[1], description.softcap
    scores = q.float() @ repeat_kv(k.float(), num_heads).mT * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    keep = keep.repeat_interleave(num_heads // keep.shape[1], 1)
    scores = scores.masked_fill(~keep, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)), lse
