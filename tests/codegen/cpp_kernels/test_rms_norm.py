"""The C++ norms against the dialect's, with residuals, offsets and odd widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import codegen.cpp_kernels.rms_norm as kernel
from codegen.cpp_kernels.rms_norm import RmsNorm, reference, rms_norm
from codegen.kernel import KernelDescription
from rewriter.errors import InputError
from tests.codegen.cpp_kernels.running import ISA_CASES, mutate, needs_compiler, poisoned
from tests.codegen.tolerances import assert_near

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned")]
__all__ = ["poisoned"]


def describe(**changes: Any) -> KernelDescription:
    return KernelDescription(operator="rms_norm", **changes)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    d: KernelDescription, rows: int, width: int, *, residual: bool, offset: float, **options: Any
) -> None:
    x, other = (normal(rows, width, dtype=d.dtype, seed=n) for n in (0, 1))
    weight, bias = (normal(width, dtype=d.weight_dtype or d.dtype, seed=n) for n in (2, 3))
    layer = d.form == "layer"
    given = (x, weight, bias if layer else None, other if residual else None)
    out, total = rms_norm(d, *given, eps=1e-5, weight_offset=offset, **options)
    expected, expected_total = reference(*given, eps=1e-5, weight_offset=offset, layer=layer)
    assert out.dtype == x.dtype
    assert_near(out, expected)
    assert torch.equal(total, expected_total)


@pytest.mark.parametrize(("isa", "dtype"), ISA_CASES)
def test_instruction_sets(isa: str, dtype: torch.dtype) -> None:
    for width in (1, 7, 63, 64, 65, 257):
        for threads in (1, 2, 3):
            check(
                describe(dtype=dtype), 5, width, residual=True, offset=0.0, threads=threads, isa=isa
            )


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(0, 6),
    width=st.integers(1, 300),
    residual=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    form=st.sampled_from(["", "layer"]),
    threads=st.integers(1, 4),
)
def test_shapes(
    rows: int, width: int, residual: bool, offset: float, form: str, threads: int
) -> None:
    if width == 1 and form == "layer":
        return  # a number minus itself: noise over eps
    check(describe(form=form), rows, width, residual=residual, offset=offset, threads=threads)


def test_weights_of_another_dtype_and_none() -> None:
    d = describe(dtype=torch.bfloat16, weight_dtype=torch.float32)
    check(d, 3, 65, residual=True, offset=1.0)
    x = normal(2, 3, 40)
    out, total = rms_norm(describe(), x, eps=1e-6)
    assert_near(out, reference(x, eps=1e-6)[0])
    assert total is x


def test_a_large_mean_does_not_cancel() -> None:
    x = 1000 + normal(3, 500)
    out, _ = rms_norm(describe(form="layer"), x, eps=1e-5)
    exact = functional.layer_norm(x.double(), (500,), eps=1e-5)
    assert (out - exact).abs().max() < 3e-4  # fp32 cannot tell the mean better than to 1e-4


def test_wrong_inputs() -> None:
    x = normal(2, 8)
    with pytest.raises(InputError, match="weight="):
        rms_norm(describe(), x, normal(7), eps=1e-5)
    with pytest.raises(InputError, match="residual="):
        rms_norm(describe(), x, None, None, normal(1, 8), eps=1e-5)
    with pytest.raises(InputError, match="bias"):
        rms_norm(describe(), x, None, normal(8), eps=1e-5)
    with pytest.raises(InputError, match="x="):
        rms_norm(describe(), x.double(), eps=1e-5)
    assert RmsNorm().supports(describe(form="x")) == 'form=\'x\': "" or "layer"'
    assert "float16" in str(RmsNorm().supports(describe(dtype=torch.float16)))


MUTATIONS = (
    ("squares / float(width) + eps", "squares / float(width)"),
    ("load(weight + i) + splat(offset)", "load(weight + i)"),
    ("to_float(weight[i]) + offset", "to_float(weight[i])"),
    ("for (; i < end; ++i) total += g(i);", ""),
    ("store(sum + i, load(x + i) + load(residual + i));", "store(sum + i, load(x + i));"),
    ("(load(x + i) - splat(mean)) * splat(scale)", "load(x + i) * splat(scale)"),
    ("out + r * width", "out"),
)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare() -> None:
        d = describe(form="layer" if "mean" in old else "")
        check(d, 3, 85, residual=True, offset=1.0)
        x = torch.zeros(1, 20)
        assert (rms_norm(d, x, eps=1e-5)[0] == 0).all()

    compare()
    mutate(monkeypatch, kernel, old, new)
    with pytest.raises(AssertionError):
        compare()
    kernel._entry.cache_clear()
