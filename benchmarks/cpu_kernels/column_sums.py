"""Column sums of causal attention, against the matrix of probabilities."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from codegen.cpp_kernels.column_sums import column_sums, cost, reference
from codegen.cpp_kernels.decode_attention import reference as attention_reference
from codegen.kernel import KernelDescription
from cpu_kernels.case import Candidate, Case

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """A prompt, and the last 32 queries of one."""
    for q_len in (1024, 32):
        yield _case(q_len, 1024)


def _case(q_len: int, kv_len: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8, q_len, 64, generator=generator)
    k = torch.randn(1, 2, kv_len, 64, generator=generator)
    told = {"softmax_scale": 0.125, "mask": "causal"}
    _, lse = attention_reference(q, k, k, **told)
    d = KernelDescription(operator="column_sums", head_dim=64, group_size=4, mask="causal")
    moved = cost(q, k, causal=True).bytes_moved
    calls = {
        "ours": lambda: column_sums(d, q, k, lse, softmax_scale=0.125),
        "matrix": lambda: reference(q, k, lse, **told),
    }
    return Case(
        kernel="column_sums",
        name=f"8/2 heads of 64, {q_len} queries, {kv_len} float32",
        candidates=[Candidate(name, call, moved) for name, call in calls.items()],
        expected=reference(q, k, lse, **told),
        tolerance=1e-5,
        buffer=torch.cat((q.flatten(), k.flatten())),
    )
