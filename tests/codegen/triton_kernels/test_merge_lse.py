"""Merging partial attentions, and pointwise work on the result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.epilogue import Epilogue, Operand, Step
from codegen.kernel import KernelDescription
from codegen.triton_kernels.merge_lse import (
    MERGE_LSE,
    merge_cost,
    merge_lse,
    merge_reference,
)
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import DEVICE, each_device, mutated, poisoned

PLAIN = KernelDescription(operator="merge_lse", head_dim=24)


def check(d: KernelDescription, num_parts: int, rows: int, device: str = DEVICE) -> None:
    """Half of the parts of some rows and all parts of the last saw nothing and hold NaN."""
    parts = torch.randn(num_parts, rows, d.head_dim)
    lses = torch.randn(num_parts, rows) * 4
    unseen = torch.rand(num_parts, rows) < 0.3
    unseen[:, -1] = rows > 1
    lses[unseen], parts[unseen] = -torch.inf, torch.nan
    parts = parts.to(d.weight_dtype or torch.float32).to(device)
    with poisoned():
        out, lse = merge_lse(d, parts, lses.to(device))
    expected, expected_lse = merge_reference(parts, lses.to(device))
    assert out.dtype == d.dtype
    assert_near(out, expected)
    assert_near(lse, expected_lse)


@each_device
@pytest.mark.parametrize("rows", [1, 7, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_all_sizes(rows: int, dtype: torch.dtype, device: str) -> None:
    check(replace(PLAIN, dtype=dtype), 5, rows, device)


@each_device
def test_parts_in_sixteen_bits(device: str) -> None:
    check(replace(PLAIN, dtype=torch.bfloat16, weight_dtype=torch.bfloat16), 2, 9, device)


@settings(max_examples=8, deadline=None)
@given(parts=st.integers(1, 6), rows=st.integers(1, 20), width=st.integers(1, 40))
def test_any_shape(parts: int, rows: int, width: int) -> None:
    check(replace(PLAIN, head_dim=width), parts, rows)


def test_merging_two_halves_is_the_softmax_of_the_whole() -> None:
    scores, values = torch.randn(3, 20, device=DEVICE), torch.randn(20, 24, device=DEVICE)
    halves = [slice(0, 8), slice(8, 20)]
    parts = torch.stack([scores[:, h].softmax(-1) @ values[h] for h in halves])
    lses = torch.stack([scores[:, h].logsumexp(-1) for h in halves])
    out, lse = merge_lse(PLAIN, parts, lses)
    assert_near(out, scores.softmax(-1) @ values)
    assert_near(lse, scores.logsumexp(-1))


@each_device
def test_pointwise_work_on_the_result(device: str) -> None:
    gate = Operand("element_0", "element", torch.bfloat16)
    steps = (Step("sigmoid", ("element_0",)), Step("mul", ("value", "t0")))
    epilogue = Epilogue(steps, (gate,), torch.bfloat16)
    d = replace(PLAIN, dtype=torch.bfloat16, epilogue=epilogue)
    parts, lses = torch.randn(2, 7, 24, device=device), torch.randn(2, 7, device=device)
    operand = torch.randn(7, 24, device=device).bfloat16()
    with poisoned():
        out, _ = merge_lse(d, parts, lses, [operand])
    assert "element_0" in MERGE_LSE.source(d)
    assert_near(out, epilogue.reference(merge_reference(parts, lses)[0], [operand]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "acc = acc * shrink[:, None] + values * weight[:, None]",
            "acc = acc + values * weight[:, None]",
        ),
        ("total = total * shrink + weight", "total = total + weight"),
        ("new_peak = tl.maximum(peak, score)", "new_peak = score"),
        ("(peak + tl.log2(total)) * LN_2", "peak + tl.log2(total)"),
        ("acc = acc / total[:, None]", "acc = acc"),
        ("mask=in_tile & seen[:, None], other=0.0", "mask=in_tile, other=0.0"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutations_are_noticed(old: str, new: str, dtype: torch.dtype) -> None:
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check(replace(PLAIN, dtype=dtype), 5, 9)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="allowed"):
        merge_lse(PLAIN, torch.zeros(2, 3, 8), torch.zeros(2, 3))
    with pytest.raises(InputError, match="contiguous"):
        merge_lse(PLAIN, torch.zeros(2, 24, 3).mT, torch.zeros(2, 3))


def test_cost_is_one_pass_over_the_parts() -> None:
    assert merge_cost(PLAIN, 4, 10).bytes_moved == 4 * 4 * 10 * 25 + 4 * 10 * 25
