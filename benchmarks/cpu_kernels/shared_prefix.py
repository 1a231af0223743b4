"""A batch of requests behind one prefix, against requests that each have a copy of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from codegen.cpp_kernels.decode_attention import decode_attention
from codegen.cpp_kernels.shared_prefix import cost, reference, shared_prefix
from codegen.kernel import KernelDescription
from cpu_kernels.case import Candidate, Case

__all__ = ["cases"]

PREFIX_LEN, KV_LEN, HEAD_DIM = 2048, 128, 64


def cases() -> Iterator[Case]:
    """16 and 4 requests, 16 heads on 4."""
    for batch_size in (16, 4):
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(batch_size, dtype)


def _case(batch_size: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(batch_size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = normal(batch_size, 16, 1, HEAD_DIM)
    prefix = normal(2, 4, PREFIX_LEN, HEAD_DIM)
    own = normal(2, batch_size, 4, KV_LEN, HEAD_DIM)
    copies = prefix.unsqueeze(1).expand(-1, batch_size, -1, -1, -1)
    k, v = torch.cat((copies, own), 3)
    scale = HEAD_DIM**-0.5
    told = {"dtype": dtype, "head_dim": HEAD_DIM, "group_size": 4, "mask": "causal"}
    d = KernelDescription(operator="shared_prefix", **told)
    single = KernelDescription(operator="decode_attention", **told)
    moved = cost(d, batch_size, 16, PREFIX_LEN, KV_LEN).bytes_moved
    every = float(k.nbytes + v.nbytes)
    candidates = [
        Candidate(
            "ours", lambda: shared_prefix(d, q, *prefix, *own, softmax_scale=scale)[0], moved
        ),
        Candidate(
            "copies", lambda: decode_attention(single, q, k, v, softmax_scale=scale)[0], every
        ),
        Candidate(
            "copies, SDPA",
            lambda: scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True),
            every,
        ),
    ]
    at = torch.full((batch_size, 1), KV_LEN - 1)
    return Case(
        kernel="shared_prefix",
        name=f"{batch_size} requests, {PREFIX_LEN} + {KV_LEN} {str(dtype)[6:]}",
        candidates=candidates,
        expected=reference(q, *prefix, *own, at, softmax_scale=scale)[0],
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        buffer=torch.cat((prefix.flatten(), own.flatten())),
    )
