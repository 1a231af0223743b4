from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen.cpp_kernels import gemv as kernel
from codegen.cpp_kernels.gemv import MAX_VECTORS, Gemv, cost, gemv, quantize_rows, reference
from codegen.epilogue import Epilogue, Operand, Step
from codegen.kernel import KernelDescription
from rewriter.errors import ConfigError, InputError
from tests.codegen.cpp_kernels.running import RUNNABLE, mutate, needs_compiler, poisoned
from tests.codegen.tolerances import assert_near

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned")]
__all__ = ["poisoned"]

FLOAT, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
Weights = tuple[Tensor, Tensor | None]


def weights(out_size: int, in_size: int, dtype: torch.dtype) -> Weights:
    """A matrix with products around 1, whose rows are not adjacent, and its scale."""
    full = torch.randn(out_size, in_size) / max(in_size, 1) ** 0.5
    narrow, scale = quantize_rows(full) if dtype == INT8 else (full.to(dtype), None)
    wide = torch.empty(out_size, in_size + 3, dtype=dtype)
    wide[:, :in_size] = narrow
    return wide[:, :in_size], scale


def check(x: Tensor, weight: Weights, threads: int, isa: str = "native") -> None:
    bias = torch.randn(weight[0].shape[0]).to(x.dtype)
    for b in (None, bias):
        actual = gemv(x, *weight, b, threads=threads, isa=isa)
        assert_near(actual, reference(x, *weight, b))


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize(("dtype", "weight_dtype", "vectors"), [(BF16, BF16, 1), (FLOAT, INT8, 3)])
def test_instruction_sets(
    isa: str, dtype: torch.dtype, weight_dtype: torch.dtype, vectors: int
) -> None:
    for out_size, in_size in itertools.product((1, 7, 63, 65), (1, 7, 63, 65, 3001)):
        x = torch.randn(vectors, in_size).to(dtype)
        for threads in (1, 2, 3):
            check(x, weights(out_size, in_size, weight_dtype), threads, isa)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "vectors"),
    [(FLOAT, FLOAT, 1), (FLOAT, BF16, 4), (BF16, INT8, MAX_VECTORS), (BF16, FLOAT, 2)],
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    out_size=st.integers(1, 140),
    in_size=st.one_of(st.integers(0, 200), st.integers(1000, 1100), st.integers(2040, 2060)),
    threads=st.integers(1, 3),
)
def test_shapes(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    vectors: int,
    out_size: int,
    in_size: int,
    threads: int,
) -> None:
    check(
        torch.randn(vectors, in_size).to(dtype), weights(out_size, in_size, weight_dtype), threads
    )


def test_leading_dimensions_strides_and_nothing_to_do() -> None:
    weight = torch.randn(5, 8)
    x = torch.randn(8, 3, 1).permute(2, 1, 0)  # columns 3 elements apart
    assert gemv(x, weight).shape == (1, 3, 5)
    assert_near(gemv(x, weight), reference(x, weight))
    assert_near(gemv(x[0, 0], weight), reference(x[0, 0], weight))
    assert gemv(torch.randn(0, 8), weight).shape == (0, 5)
    assert gemv(torch.randn(2, 8), torch.randn(0, 8)).shape == (2, 0)


def test_nan_and_infinity_reach_their_row_alone() -> None:
    x, weight = torch.ones(1, 70), torch.ones(9, 70)
    weight[2, 69], weight[8, 0], weight[3, 5] = float("nan"), float("inf"), float("-inf")
    actual = gemv(x, weight, threads=2)[0]
    assert actual[2].isnan() and actual[8] == float("inf") and actual[3] == float("-inf")
    assert (actual[[0, 1, 4, 5, 6, 7]] == 70).all()


def test_same_numbers_whatever_the_threads() -> None:
    x, weight = torch.randn(3, 300), torch.randn(77, 300)
    assert torch.equal(gemv(x, weight, threads=1), gemv(x, weight, threads=3))


def test_epilogue() -> None:
    residual = Operand("element_0", "element", FLOAT)
    steps = (Step("silu", ("value",)), Step("mul", ("t0", 2.0)), Step("add", ("t1", "element_0")))
    epilogue = Epilogue(steps, (residual,), BF16)
    x, weight, added = torch.randn(2, 40), torch.randn(9, 40), torch.randn(2, 9)
    actual = gemv(x, weight, epilogue=epilogue, operands=[added], threads=2)
    assert actual.dtype == BF16
    assert_near(actual, epilogue.reference(reference(x, weight), [added]))
    with pytest.raises(InputError, match="operands"):
        gemv(x, weight, epilogue=epilogue)


def test_quantize_rows() -> None:
    weight = torch.randn(20, 300) * torch.logspace(-6, 6, 20)[:, None]
    weight[3] = 0
    quantized, scale = quantize_rows(weight)
    assert quantized.dtype == INT8 and scale.dtype == FLOAT and scale[3] == 1
    assert (quantized.abs().amax(dim=1)[scale != 1] == 127).all() and (quantized[3] == 0).all()
    error = (quantized * scale[:, None] - weight).abs()
    assert (error <= scale[:, None] * 0.5001).all()
    assert quantize_rows(torch.empty(2, 0))[1].tolist() == [1, 1]
    for wrong in (torch.tensor([[float("inf")]]), torch.ones(3), torch.ones(2, 2).int()):
        with pytest.raises(InputError, match="weight="):
            quantize_rows(wrong)


def test_cost_reads_the_weights_once() -> None:
    one, eight = (cost(torch.empty(m, 64), torch.empty(32, 64)) for m in (1, 8))
    assert one.flops == 2 * 32 * 64 and eight.flops == 8 * one.flops
    assert eight.bytes_moved - one.bytes_moved == 7 * (64 + 32) * 4


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({"x": torch.zeros(9, 8)}, "at most 8 vectors"),
        ({"x": torch.zeros(1, 7)}, "last dimension of 8"),
        ({"x": torch.zeros(())}, "x="),
        ({"x": torch.zeros(1, 8).half()}, "x="),
        ({"weight": torch.zeros(8)}, "weight="),
        ({"weight": torch.zeros(8, 5).T}, "adjacent columns"),
        ({"weight": torch.zeros(5, 8).half()}, "weight="),
        ({"weight": torch.zeros(5, 8).to(INT8)}, "scale"),
        ({"scale": torch.ones(5)}, "scale"),
        ({"bias": torch.zeros(4)}, "bias="),
        ({"bias": torch.zeros(5).bfloat16()}, "bias="),
        ({"bias": torch.zeros(10)[::2]}, "bias="),
        ({"x": torch.zeros(1, 8, device="meta")}, "device"),
    ],
)
def test_wrong_inputs(given_: dict[str, Tensor], told: str) -> None:
    arguments = {"x": torch.zeros(1, 8), "weight": torch.zeros(5, 8), **given_}
    with pytest.raises(InputError, match=told):
        gemv(**arguments)


def test_supports_and_source() -> None:
    kernel_ = Gemv()
    assert "dtype=float16" in str(
        kernel_.supports(KernelDescription(operator="gemv", dtype=torch.half))
    )
    int64 = KernelDescription(operator="gemv", weight_dtype=torch.int64)
    assert "weight_dtype=int64" in str(kernel_.supports(int64))
    nine = KernelDescription(operator="gemv", form="9")
    assert "form='9'" in str(kernel_.supports(nine))
    with pytest.raises(ConfigError, match="form"):
        kernel_.source(nine)
    fine = KernelDescription(operator="gemv", weight_dtype=INT8, form="2")
    text = kernel_.source(fine)
    assert text == kernel_.source(fine) and '#include "' not in text
    assert "Description: gemv{weight_dtype=int8,form=2}" in text.splitlines()[1]


MUTATIONS = (
    ("acc[r][m] += weights * part[m]", "acc[r][m] = weights * part[m]"),
    ("part[m] = load(x + m * x_stride + c)", "part[m] = load(x + c)"),
    ("c = rest; c < columns", "c = rest + 1; c < columns"),
    ("to_float(rows[r][c]) * x[m * x_stride + c]", "to_float(rows[r][c]) * x[c]"),
    ("whole = columns - columns % STEP", "whole = columns"),
    ("rows[r] = row_at(i + r)", "rows[r] = row_at(i)"),
    ("sweep_rows<R / 2, M>(i, end", "sweep_rows<R / 2, M>(i + 1, end"),
    ("w + (first + i) * stride + c;", "w + first + i * stride + c;"),
    ("sums[i][m] += value;", "sums[i][m] = value;"),
    ("row_at, x + c, x_stride", "row_at, x, x_stride"),
    ("out(first + i, m, sums[i][m])", "out(first + i, m, sums[i][0])"),
    (
        "wide[m * columns + c] = to_float(x[m * stride + c])",
        "wide[m * columns + c] = to_float(x[c])",
    ),
    ("value *= scale[row]", "value *= scale[0]"),
    ("to_float(bias[row])", "to_float(bias[0])"),
    ("out[m * out_stride + row]", "out[row]"),
)
"""Each must make the comparison below fail: text that is there, and what takes its place."""


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 3001).to(BF16), weights(139, 3001, INT8)
    check(x, weight, 2)
    mutate(monkeypatch, kernel, old, new)
    with pytest.raises(AssertionError):
        check(x, weight, 2)
    kernel._entry.cache_clear()
