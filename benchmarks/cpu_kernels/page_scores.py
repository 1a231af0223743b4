"""Votes of all heads for the pages of a long cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from codegen.cpp_kernels.page_scores import cost, page_scores, reference
from codegen.kernel import KernelDescription
from cpu_kernels.case import Candidate, Case

__all__ = ["cases"]

KV_LEN, KEEP, HEAD_DIM = 16384, 64, 128


def cases() -> Iterator[Case]:
    """32 heads on 8, pages of 16."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(dtype)


def _case(dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 32, HEAD_DIM, generator=generator).to(dtype)
    k = torch.randn(1, 8, KV_LEN, HEAD_DIM, generator=generator).to(dtype)
    scale = HEAD_DIM**-0.5
    d = KernelDescription(
        operator="page_scores",
        dtype=dtype,
        head_dim=HEAD_DIM,
        group_size=4,
        page_size=16,
        form="largest",
    )

    def folded() -> torch.Tensor:
        scores = torch.matmul(q.view(1, 8, 4, HEAD_DIM), k.mT).float() * scale
        votes = scores.softmax(-1).sum((1, 2)).unflatten(1, (-1, 16)).amax(-1)
        votes.topk(KEEP)
        return votes

    moved = cost(d, 1, 32, KV_LEN).bytes_moved
    ours = lambda: page_scores(d, q, k, keep=KEEP, softmax_scale=scale)[0]  # noqa: E731
    return Case(
        kernel="page_scores",
        name=f"32/8 heads of {HEAD_DIM}, {KV_LEN} {str(dtype)[6:]}",
        candidates=[Candidate("ours", ours, moved), Candidate("torch, folded", folded, moved)],
        expected=reference(d, q, k, first=0, last=KV_LEN, softmax_scale=scale),
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        buffer=k,
    )
