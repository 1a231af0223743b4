"""One new token over a cache: repeated and grouped heads, both dtypes, short and long caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from codegen.cpp_kernels.decode_attention import cost, decode_attention, reference
from codegen.kernel import KernelDescription
from cpu_kernels.case import Candidate, Case
from rewriter.dialect.attention import repeat_kv
from rewriter.dialect.grouped import grouped_attention

__all__ = ["cases"]

HEADS = ((32, 8), (12, 12))
TARGET = 0.70
LARGE = 4096
"""Entries from which the target holds."""


def cases() -> Iterator[Case]:
    """All of heads, widths and dtypes at 4096 entries; shorter and longer caches of one shape."""
    for num_heads, num_kv_heads in HEADS:
        for head_dim in (64, 128):
            for dtype in (torch.float32, torch.bfloat16):
                yield _case(num_heads, num_kv_heads, head_dim, LARGE, dtype)
    for kv_len in (128, 1024, 16384):
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(32, 8, 128, kv_len, dtype)


def _case(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_len: int, dtype: torch.dtype
) -> Case:
    generator = torch.Generator().manual_seed(kv_len)
    q = torch.randn(1, num_heads, 1, head_dim, generator=generator).to(dtype)
    cache = torch.randn(2, 1, num_kv_heads, kv_len, head_dim, generator=generator).to(dtype)
    k, v = cache
    scale = head_dim**-0.5
    d = KernelDescription(
        operator="decode_attention",
        dtype=dtype,
        head_dim=head_dim,
        group_size=num_heads // num_kv_heads,
        mask="causal",
    )
    moved = cost(d, 1, num_heads, 1, kv_len).bytes_moved
    calls = {
        "ours": lambda: decode_attention(d, q, k, v, softmax_scale=scale)[0],
        "folded": lambda: grouped_attention.reference(q, k, v, softmax_scale=scale, mask="causal"),
        "SDPA": lambda: scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True),
        "repeat, SDPA": lambda: scaled_dot_product_attention(
            q, repeat_kv(k, num_heads), repeat_kv(v, num_heads), scale=scale
        ),
    }
    return Case(
        kernel="decode_attention",
        name=f"{num_heads}/{num_kv_heads} heads of {head_dim}, {kv_len} {str(dtype)[6:]}",
        candidates=[Candidate(name, call, moved) for name, call in calls.items()],
        expected=reference(q, k, v, softmax_scale=scale, mask="causal")[0],
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        buffer=cache,
        target=TARGET if kv_len >= LARGE else 0.0,
    )
