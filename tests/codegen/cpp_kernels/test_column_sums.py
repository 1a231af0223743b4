"""The C++ column sums of attention against the whole matrix of probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import codegen.cpp_kernels.column_sums as kernel
from codegen.cpp_kernels.column_sums import ColumnSums, column_sums, reference
from codegen.cpp_kernels.decode_attention import reference as attention_reference
from codegen.kernel import KernelDescription
from rewriter.dialect.attention import MASKS
from rewriter.errors import InputError
from tests.codegen.cpp_kernels.running import ISA_CASES, mutate, needs_compiler, poisoned
from tests.codegen.tolerances import assert_near

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned")]
__all__ = ["poisoned"]


def describe(**changes: Any) -> KernelDescription:
    told = {"operator": "column_sums", "head_dim": 20, "mask": "causal"}
    return KernelDescription(**{**told, **changes})


def make(
    heads: tuple[int, int],
    q_len: int,
    kv_len: int,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 2,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kv_len)
    q = torch.randn(batch_size, heads[0], q_len, 20, generator=generator).to(dtype)
    return q, torch.randn(batch_size, heads[1], kv_len, 20, generator=generator).to(dtype)


def check(d: KernelDescription, q: Tensor, k: Tensor, *positions: Tensor, **options: Any) -> None:
    structure = {
        "softmax_scale": 0.3,
        "mask": d.mask,
        "span": d.span,
        "softcap": d.softcap,
        "num_sink_tokens": d.num_sink_tokens,
    }
    _, lse = attention_reference(q, k, k, *positions, **structure)
    sums = column_sums(d, q, k, lse, *positions, softmax_scale=0.3, **options)
    assert_near(sums, reference(q, k, lse, *positions, **structure))
    seeing = (lse > -math.inf).sum((1, 2)).float()
    torch.testing.assert_close(sums.sum((1, 2)), seeing, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("isa", "dtype"), ISA_CASES)
def test_instruction_sets(isa: str, dtype: torch.dtype) -> None:
    for q_len, kv_len in ((1, 1), (7, 63), (65, 65), (3, 130)):
        for threads in (1, 2, 3):
            q, k = make((4, 2), q_len, kv_len, dtype)
            check(describe(dtype=dtype), q, k, threads=threads, isa=isa)


@settings(deadline=None, max_examples=50)
@given(
    group_size=st.sampled_from([1, 4, 8]),
    kv_len=st.integers(1, 150),
    part=st.floats(0.01, 1),
    mask=st.sampled_from((*MASKS, "sinks_window")),
    span=st.integers(1, 150),
    softcap=st.sampled_from([0.0, 2.0]),
    threads=st.integers(1, 4),
)
def test_masks(
    group_size: int,
    kv_len: int,
    part: float,
    mask: str,
    span: int,
    softcap: float,
    threads: int,
) -> None:
    q, k = make((2 * group_size, 2), math.ceil(part * kv_len), kv_len)
    d = describe(mask=mask, span=span, softcap=softcap, num_sink_tokens=span % 5)
    check(d, q, k, threads=threads)


def test_positions_and_rows_that_see_nothing() -> None:
    q, k = make((4, 2), 5, 80)
    k_positions = torch.arange(80).flip(0).expand(2, 80).clone()
    k_positions[:, :30] = -1
    q_positions = torch.tensor([[-1, -1, 0, 10, 60], [40, 41, 42, 43, 44]])
    d = describe(mask="sliding_window", span=20, layout="slots")
    check(d, q, k, q_positions, k_positions)


def test_wrong_inputs() -> None:
    q, k = make((4, 2), 5, 80)
    with pytest.raises(InputError, match="lse="):
        column_sums(describe(), q, k, torch.zeros(2, 4, 4), softmax_scale=0.3)
    with pytest.raises(InputError, match="k="):
        column_sums(describe(), q, k.double(), torch.zeros(2, 4, 5), softmax_scale=0.3)
    assert "paged" in str(ColumnSums().supports(describe(layout="paged")))


MUTATIONS = (
    ("mine[e] - total", "mine[e]"),
    ("if (total == -INFINITY) continue;", ""),
    ("first = begin - base;", "first = begin;"),
    ("last = end - 1 + span - base;", "last = end - 1 - base;"),
    ("g * shape.q_len + i", "i"),
    ("at += num_threads", "at += num_threads + 1"),
    ("score(b, head, row + r, start", "score(b, head, row, start"),
)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = make((4, 2), 40, 200)

    def compare() -> None:
        check(describe(mask="sliding_window", span=30), q, k)
        nowhere = torch.tensor([[-1]]).expand(2, 40)
        check(describe(), q, k, nowhere)

    compare()
    mutate(monkeypatch, kernel, old, new)
    with pytest.raises(AssertionError):
        compare()
    kernel._entry.cache_clear()
