"""Windows and sinks over a prompt, against PyTorch's kernel with the mask as a tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from codegen.cpp_kernels.decode_attention import reference
from codegen.cpp_kernels.prefill_attention import cost, prefill_attention
from codegen.kernel import KernelDescription
from cpu_kernels.case import Candidate, Case

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """2048 queries, 8 heads on 2."""
    for dtype in (torch.float32, torch.bfloat16):
        for mask, span in (
            ("sliding_window", 256),
            ("sinks_window", 256),
            ("sliding_window", 1024),
        ):
            yield _case(2048, mask, span, dtype)


def _case(q_len: int, mask: str, span: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8, q_len, 64, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, 2, q_len, 64, generator=generator).to(dtype)
    d = KernelDescription(
        operator="prefill_attention",
        dtype=dtype,
        head_dim=64,
        group_size=4,
        mask=mask,
        span=span,
        num_sink_tokens=4,
    )
    i, j = torch.arange(q_len).unsqueeze(1), torch.arange(q_len)
    near = (j <= i) & (i - j < span)
    keep = near | ((j <= i) & (j < 4)) if mask == "sinks_window" else near
    moved = cost(d, q, k, v).bytes_moved
    calls = {
        "ours": lambda: prefill_attention(d, q, k, v, softmax_scale=0.125)[0],
        "SDPA, mask": lambda: scaled_dot_product_attention(
            q, k, v, keep, scale=0.125, enable_gqa=True
        ),
    }
    told = {"softmax_scale": 0.125, "mask": mask, "span": span, "num_sink_tokens": 4}
    return Case(
        kernel="prefill_attention",
        name=f"{q_len} queries, {mask} {span} {str(dtype)[6:]}",
        candidates=[Candidate(name, call, moved) for name, call in calls.items()],
        expected=reference(q, k, v, **told)[0],
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        buffer=torch.cat((q.flatten(), k.flatten(), v.flatten())),
    )
