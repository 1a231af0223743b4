"""The C++ gated activation against every activation of the dialect."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import codegen.cpp_kernels.gated_activation as kernel
from codegen.cpp_kernels.gated_activation import (
    ACTIVATIONS,
    GatedActivation,
    gated_activation,
    reference,
)
from codegen.kernel import KernelDescription
from rewriter.dialect.mlp import ACTIVATIONS as MEANINGS
from rewriter.errors import InputError
from tests.codegen.cpp_kernels.running import ISA_CASES, mutate, needs_compiler, poisoned
from tests.codegen.tolerances import assert_near

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned")]
__all__ = ["poisoned"]


def describe(form: str = "silu", dtype: torch.dtype = torch.float32) -> KernelDescription:
    return KernelDescription(operator="gated_activation", form=form, dtype=dtype)


def check(
    form: str, rows: int, width: int, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """Both halves of one tensor, as one product for gate and up gives them."""
    generator = torch.Generator().manual_seed(rows + width)
    both = (4 * torch.randn(rows, 2 * width, generator=generator)).to(dtype)
    gate, up = both.chunk(2, dim=1)
    out = gated_activation(describe(form, dtype), gate, up, **options)
    assert out.dtype == dtype
    assert_near(out, reference(gate, up, form))


@pytest.mark.parametrize(("isa", "dtype"), ISA_CASES)
def test_instruction_sets(isa: str, dtype: torch.dtype) -> None:
    for width in (1, 7, 63, 64, 65):
        for threads in (1, 2, 3):
            check("silu", 3, width, dtype, threads=threads, isa=isa)


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_activations(form: str) -> None:
    check(form, 2, 200)


def test_every_activation_of_the_dialect_is_there() -> None:
    assert ACTIVATIONS.keys() == MEANINGS.keys()


def test_extremes() -> None:
    gate = torch.tensor([-math.inf, -200.0, -0.0, 200.0, math.nan])
    out = gated_activation(describe("sigmoid"), gate, torch.ones(5))
    assert_near(out[:4], torch.tensor([0.0, 0.0, 0.5, 1.0]))
    assert out[4].isnan()


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(0, 5), width=st.integers(0, 70), threads=st.integers(1, 5))
def test_shapes(rows: int, width: int, threads: int) -> None:
    check("silu", rows, width, threads=threads)


def test_wrong_inputs() -> None:
    with pytest.raises(InputError, match="up="):
        gated_activation(describe(), torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match="gate="):
        gated_activation(describe(), torch.zeros(2, 3).double(), torch.zeros(2, 3))
    assert "form" in str(GatedActivation().supports(describe("swish")))


MUTATIONS = (
    ("act(to_float(g[i])) * to_float(u[i])", "to_float(g[i]) * to_float(u[i])"),
    ("up + row * up_stride + column", "up + row * width + column"),
    ("T* to = out + at;", "T* to = out;"),
    ("x / (1.0f + exp_(-x))", "x / (1.0f + exp_(x))"),
)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check("silu", 3, 40)
    mutate(monkeypatch, kernel, old, new)
    with pytest.raises(AssertionError):
        check("silu", 3, 40)
    kernel._entry.cache_clear()
