"""Root-mean-square normalisation, with and without a residual."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.epilogue import Epilogue, Operand, Step
from codegen.kernel import KernelDescription
from codegen.triton_kernels.rms_norm import (
    RMS_NORM,
    rms_norm,
    rms_norm_cost,
    rms_norm_reference,
)
from rewriter.dialect.norm import rms_norm as dialect_rms_norm
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import each_device, mutated, poisoned

SCALE = Epilogue(
    (Step("mul", ("value", "column_0")),), (Operand("column_0", "column", torch.float32),)
)
MUTATIONS = [
    ("c < WIDTH", "c < WIDTH - 1"),
    ("/ WIDTH", "/ BLOCK"),
    ("mean + eps", "mean"),
    ("weight_offset + ", ""),
    ("wide += tl.load", "wide = tl.load"),
    ("row * residual_row", "0 * residual_row"),
    ("acc = acc * column_0", "acc = acc"),
    ("tl.store(summed", "tl.store(out"),
]
OPTIONS = [{}, {"weight_offset": 1.0}, {"wide_weight": True}]


def check(
    rows: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    residual: bool = True,
    device: str = "cpu",
    epilogue: Epilogue | None = None,
    **options: float,
) -> None:
    """Rows have NaN between them."""
    x, added = torch.full((2, rows, width + 2), torch.nan, device=device).to(dtype)[..., :width]
    x.copy_(torch.randn(rows, width) / 8)
    added.copy_(torch.randn(rows, width) / 8)
    weight = torch.randn(width, device=device).to(dtype)
    operands = [torch.randn(width, device=device)] if epilogue else []
    other = added if residual else None
    given = {"eps": 1e-2, "epilogue": epilogue, "operands": operands, **options}
    with poisoned():
        out, summed = rms_norm(x, weight, other, **given)
    assert_near(summed, rms_norm_reference(x, weight, other, **given)[1])
    assert_near(out, rms_norm_reference(summed, weight, **given)[0])  # its rounding counts once


@each_device
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_options(residual: bool, dtype: torch.dtype, options: dict, device: str) -> None:
    for width in (1, 7, 65):
        check(3, width, dtype, residual=residual, device=device, epilogue=SCALE, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_dialects(options: dict) -> None:
    x, weight = torch.randn(4, 63), torch.randn(63)
    expected = dialect_rms_norm.reference(x, weight, eps=1e-5, **options)
    assert_near(rms_norm(x, weight, eps=1e-5, **options)[0], expected)


def test_no_rows() -> None:
    check(0, 5)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 70), st.booleans())
def test_any_shape(rows: int, width: int, residual: bool) -> None:
    check(rows, width, residual=residual)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str) -> None:
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check(3, 65, epilogue=SCALE, weight_offset=1.0)


def test_rounding_before_the_weight_is_kept() -> None:
    with (
        mutated("acc = acc.to(x.dtype.element_ty).to(tl.float32)", "acc = acc * 1.02"),
        pytest.raises(AssertionError, match="close"),
    ):
        check(3, 65, torch.bfloat16)


def test_what_is_refused() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match=r"weight: contiguous \[4\]"):
        rms_norm(x, torch.randn(5), eps=1e-6)
    with pytest.raises(InputError, match="residual"):
        rms_norm(x, torch.randn(4), torch.randn(3, 4), eps=1e-6)
    with pytest.raises(InputError, match="head_dim=20000"):
        rms_norm(torch.randn(1, 20000), torch.randn(20000), eps=1e-6)
    assert "form='x'" in (RMS_NORM.supports(KernelDescription(operator="rms_norm", form="x")) or "")


def test_cost() -> None:
    assert rms_norm_cost(torch.empty(2, 8), True).bytes_moved == 4 * 16 * 4
