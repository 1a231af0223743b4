"""Rotation of queries and keys, and their way into the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernel import KernelDescription
from codegen.triton_kernels.rotary_append import (
    ROTARY_APPEND,
    rotary_append,
    rotary_append_cost,
    rotary_append_reference,
)
from rewriter.dialect.rope import rope
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import each_device, mutated, poisoned

MUTATIONS = [
    ("d < ROTARY_DIM", "d < ROTARY_DIM - 2"),
    ("tl.where(is_first, -partner, partner)", "tl.where(is_first, partner, -partner)"),
    ("pair = d % HALF", "pair = d % (HALF - 1)"),
    ("tl.where(is_first, d + 1, d - 1)", "d"),
    ("(offset + t) * kc_row", "t * kc_row"),
    ("(offset + t) * vc_row", "offset * vc_row"),
    ("b * table_batch", "0 * table_batch"),
    ("t * table_row", "0 * table_row"),
    ("h -= num_heads", "h -= num_heads - 0 * h - 1"),
    ("c < VALUE_DIM", "c < VALUE_DIM - 1"),
    ("h * k_head", "0 * k_head"),
]


def check(
    group_size: int = 2,
    head_dim: int = 16,
    rotary_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    *,
    interleaved: bool = False,
    q_len: int = 3,
    value_dim: int | None = None,
    cache_dtype: torch.dtype | None = None,
    tables: int = 2,
    device: str = "cpu",
) -> None:
    """Caches hold NaN and stay so outside of the new entries; q and k are transposed."""
    value_dim = value_dim or head_dim
    q = torch.randn(2, q_len, 2 * group_size, head_dim, device=device).to(dtype).transpose(1, 2)
    k = torch.randn(2, q_len, 2, head_dim, device=device).to(dtype).transpose(1, 2)
    v = torch.randn(2, 2, q_len, value_dim, device=device).to(dtype)
    angle = torch.rand(tables, q_len, rotary_dim // 2, device=device) * 6
    cos, sin = angle.cos(), angle.sin()
    empty = [torch.full((2, 2, 11, d), torch.nan, device=device) for d in (head_dim, value_dim)]
    caches, expected_caches = (
        [cache.to(cache_dtype or dtype, copy=True) for cache in empty] for _ in range(2)
    )
    with poisoned():
        out = rotary_append(q, k, v, cos, sin, *caches, 5, interleaved=interleaved)
    expected = rotary_append_reference(
        q, k, v, cos, sin, *expected_caches, 5, interleaved=interleaved
    )
    assert_near(out, expected)
    for cache, wanted in zip(caches, expected_caches, strict=True):
        if not torch.equal(cache.isnan(), wanted.isnan()):
            raise AssertionError("the written entries are not close to those expected")
        assert_near(cache.nan_to_num(), wanted.nan_to_num())


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_groups(group_size: int, interleaved: bool, dtype: torch.dtype, device: str) -> None:
    check(group_size, dtype=dtype, interleaved=interleaved, device=device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (63, 32), (65, 64), (8, 6)])
def test_odd_widths(head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    check(1, head_dim, rotary_dim, interleaved=interleaved, value_dim=7, q_len=1)


def test_one_table_and_a_narrower_cache() -> None:
    check(tables=1, cache_dtype=torch.bfloat16)


def test_no_tokens() -> None:
    check(q_len=0)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(1, 16), st.booleans(), st.integers(1, 4))
def test_any_shape(group_size: int, half: int, interleaved: bool, q_len: int) -> None:
    check(group_size, 33, 2 * half, interleaved=interleaved, q_len=q_len)


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_the_dialects(interleaved: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    angle = torch.rand(1, 5, 3)
    caches = torch.zeros(2, 1, 2, 5, 8)
    out = rotary_append(q, k, v, angle.cos(), angle.sin(), *caches, 0, interleaved=interleaved)
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    assert_near(out, rope.reference(q, cos, sin, interleaved=interleaved))
    assert_near(caches[0], rope.reference(k, cos, sin, interleaved=interleaved))
    assert torch.equal(caches[1], v)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str) -> None:
    def everything() -> None:
        for interleaved in (False, True):
            check(interleaved=interleaved)

    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        everything()


def test_what_is_refused() -> None:
    q, caches = torch.randn(1, 2, 3, 8), torch.zeros(2, 1, 2, 5, 8)
    table = torch.ones(1, 3, 4)
    given = {"interleaved": False}
    with pytest.raises(InputError, match="offset: 3 \\+ 3 entries in a capacity of 5"):
        rotary_append(q, q, q, table, table, *caches, 3, **given)
    with pytest.raises(InputError, match="cos"):
        rotary_append(q, q, q, table[:, :2], table[:, :2], *caches, 0, **given)
    with pytest.raises(InputError, match="k_cache"):
        rotary_append(q, q, q, table, table, caches[0][..., :4], caches[1], 0, **given)
    with pytest.raises(InputError, match="span=10"):
        wide = torch.ones(1, 3, 5)
        rotary_append(q, q, q, wide, wide, *caches, 0, **given)
    odd = KernelDescription(operator="rotary_append", head_dim=8, span=3, form="halves")
    assert "span=3, allowed: an even" in (ROTARY_APPEND.supports(odd) or "")


def test_cost() -> None:
    q = torch.empty(1, 2, 3, 8)
    assert rotary_append_cost(q, q, q).bytes_moved == 2 * 3 * 48 * 4
