"""The C++ merge of partial attentions against one softmax over everything."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import codegen.cpp_kernels.merge_lse as kernel
from codegen.cpp_kernels.merge_lse import MergeLse, merge_lse, reference
from codegen.kernel import KernelDescription
from rewriter.errors import InputError
from tests.codegen.cpp_kernels.running import ISA_CASES, mutate, needs_compiler, poisoned
from tests.codegen.tolerances import assert_near

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned")]
__all__ = ["poisoned"]


def describe(dtype: torch.dtype = torch.float32, **changes: Any) -> KernelDescription:
    return KernelDescription(operator="merge_lse", dtype=dtype, **changes)


def make(num_parts: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Some parts saw nothing and hold NaN."""
    generator = torch.Generator().manual_seed(num_parts * rows)
    parts = torch.randn(num_parts, rows, width, generator=generator)
    lse = 5 * torch.randn(num_parts, rows, generator=generator)
    nothing = torch.rand(num_parts, rows, generator=generator) < 0.3
    return parts.masked_fill(nothing.unsqueeze(-1), math.nan), lse.masked_fill(nothing, -math.inf)


def check(parts: Tensor, lse: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    out, out_lse = merge_lse(describe(dtype), parts, lse, **options)
    expected, expected_lse = reference(parts, lse)
    assert out.dtype == dtype
    assert_near(out, expected)
    assert_near(out_lse, expected_lse)


@pytest.mark.parametrize(("isa", "dtype"), ISA_CASES)
def test_instruction_sets(isa: str, dtype: torch.dtype) -> None:
    for width in (1, 7, 63, 64, 65):
        for threads in (1, 2, 3):
            check(*make(3, 9, width), dtype, threads=threads, isa=isa)


@settings(deadline=None, max_examples=30)
@given(
    num_parts=st.integers(1, 6),
    rows=st.integers(0, 9),
    width=st.integers(1, 70),
    threads=st.integers(1, 4),
)
def test_shapes(num_parts: int, rows: int, width: int, threads: int) -> None:
    check(*make(num_parts, rows, width), threads=threads)


def test_is_one_softmax_over_everything() -> None:
    scores, values = torch.randn(4, 90), torch.randn(90, 16)
    cuts = (slice(0, 10), slice(10, 11), slice(11, 90))
    parts = torch.stack([scores[:, c].softmax(-1) @ values[c] for c in cuts])
    lse = torch.stack([scores[:, c].logsumexp(-1) for c in cuts])
    out, out_lse = merge_lse(describe(), parts, lse)
    assert_near(out, scores.softmax(-1) @ values)
    assert_near(out_lse, scores.logsumexp(-1))


def test_nothing_seen_and_large_numbers() -> None:
    lse = torch.tensor([[-math.inf, 500.0, -500.0], [-math.inf, 499.0, -501.0]])
    check(torch.randn(2, 3, 20), lse)
    out, out_lse = merge_lse(describe(), torch.full((2, 1, 4), math.nan), lse[:, :1])
    assert (out == 0).all() and (out_lse == -math.inf).all()


def test_wrong_inputs() -> None:
    parts, lse = make(2, 3, 4)
    with pytest.raises(InputError, match="lse="):
        merge_lse(describe(), parts, lse[:1])
    with pytest.raises(InputError, match="parts="):
        merge_lse(describe(weight_dtype=torch.bfloat16), parts, lse)
    assert "float16" in str(MergeLse().supports(describe(torch.float16)))


MUTATIONS = (
    ("highest == -INFINITY ? 0.0f : highest;", "highest;"),
    ("if (weights[p] != 0) sum += splat", "sum += splat"),
    ("sum * splat(scale)", "sum"),
    ("shift + std::log(total);", "std::log(total);"),
)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, lse = make(3, 9, 40)
    lse[:, 0] = -math.inf
    check(parts, lse)
    mutate(monkeypatch, kernel, old, new)
    with pytest.raises(AssertionError):
        check(parts, lse)
    kernel._entry.cache_clear()
