"""Products of few rows with fp32, bf16 and int8 weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.epilogue import Epilogue, Operand, Step
from codegen.kernel import KernelDescription
from codegen.triton_kernels.gemv import GEMV, gemv, gemv_cost, gemv_reference
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import each_device, mutated, poisoned

BIAS_GELU_RESIDUAL = Epilogue(
    (
        Step("add", ("value", "column_0")),
        Step("gelu", ("t0",)),
        Step("mul", ("t1", "row_0")),
        Step("add", ("t2", "element_0")),
    ),
    (
        Operand("column_0", "column", torch.float32),
        Operand("row_0", "row", torch.float32),
        Operand("element_0", "element", torch.bfloat16),
    ),
)
MUTATIONS = [
    ("at < in_features", "at < in_features - 1"),
    ("n < out_features", "n < out_features - 1"),
    ("range(0, in_features, BLOCK_K)", "range(BLOCK_K, in_features, BLOCK_K)"),
    ("n * weight_row + at", "m * weight_row + at"),
    ("acc += product", "acc = product"),
    ("partial += w", "partial = w"),
    ("m * x_row", "0 * x_row"),
    ("acc *= tl.load(scale + n", "acc *= tl.load(scale + m"),
    ("m * element_0_row_stride", "0 * element_0_row_stride"),
    ("acc = t2 + element_0", "acc = t2"),
]


def check(
    rows: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    *,
    int8: bool = False,
    device: str = "cpu",
    epilogue: Epilogue | None = None,
) -> None:
    """The rows of x and of the weight have NaN between them."""
    x = torch.full((rows, in_features + 3), torch.nan, dtype=dtype, device=device)[:, :in_features]
    x.copy_(torch.randn(rows, in_features))
    weight, scale = torch.randn(out_features, in_features, device=device).to(dtype), None
    if int8:
        weight = torch.randint(-127, 128, weight.shape, dtype=torch.int8, device=device)
        scale = torch.rand(out_features, device=device) / 100
    shapes = (out_features,), (rows, 1), (rows, out_features)
    operands = [torch.randn(s, device=device) for s in shapes]
    operands = [*operands[:2], operands[2].bfloat16()] if epilogue else []
    with poisoned():
        out = gemv(x, weight, scale, epilogue=epilogue, operands=operands)
    expected = gemv_reference(x, weight, scale, epilogue=epilogue, operands=operands)
    assert out.dtype == dtype
    assert_near(out, expected)


@each_device
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_odd_sizes(rows: int, dtype: torch.dtype, int8: bool, device: str) -> None:
    check(rows, 65, 63, dtype, int8=int8, device=device, epilogue=BIAS_GELU_RESIDUAL)
    check(rows, 1, 1, dtype, int8=int8, device=device)


@each_device
@pytest.mark.parametrize("rows", [1, 3])
def test_several_steps_along_the_inputs(rows: int, device: str) -> None:
    check(rows, 7, 2049, device=device)


@pytest.mark.parametrize(("rows", "out_features", "in_features"), [(0, 5, 5), (2, 0, 5), (1, 5, 0)])
def test_empty(rows: int, out_features: int, in_features: int) -> None:
    check(rows, out_features, in_features)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 16), st.integers(1, 70), st.integers(1, 70))
def test_any_shape(rows: int, out_features: int, in_features: int) -> None:
    check(rows, out_features, in_features)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str) -> None:
    def everything() -> None:
        for rows in (1, 7):
            check(rows, 65, 1100, int8=True, epilogue=BIAS_GELU_RESIDUAL)

    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        everything()


def test_what_is_refused() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match="17 rows"):
        gemv(torch.randn(17, 4), torch.randn(3, 4))
    with pytest.raises(InputError, match="5 inputs where x has 4"):
        gemv(x, torch.randn(3, 5))
    with pytest.raises(InputError, match="scale: float32"):
        gemv(x, torch.zeros(3, 4, dtype=torch.int8))
    with pytest.raises(InputError, match="bfloat16 beside float32"):
        gemv(x, torch.randn(3, 4).bfloat16())
    with pytest.raises(InputError, match="columns are 2 elements apart"):
        gemv(x[:, ::2], torch.randn(3, 2))
    with pytest.raises(InputError, match="0 operands for an epilogue that takes 3"):
        gemv(x, torch.randn(3, 4), epilogue=BIAS_GELU_RESIDUAL)
    refusal = GEMV.supports(KernelDescription(operator="gemv", form="many"))
    assert refusal == "form='many', allowed: 'row', 'rows'"
    refusal = GEMV.supports(KernelDescription(operator="gemv", form="row", dtype=torch.float64))
    assert refusal == "dtype=float64, allowed: float32, bfloat16, float16"
    half = KernelDescription(operator="gemv", form="row", weight_dtype=torch.float16)
    assert "weight_dtype=float16" in (GEMV.supports(half) or "")


def test_cost_counts_the_weight_once() -> None:
    cost = gemv_cost(2, torch.empty(8, 4, dtype=torch.bfloat16))
    assert (cost.flops, cost.bytes_moved) == (128, 64)
