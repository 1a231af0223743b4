"""act(gate) · up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.triton_kernels.gated_activation import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_cost,
    gated_activation_reference,
)
from rewriter.dialect.mlp import ACTIVATIONS as DIALECT
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import each_device, mutated, poisoned

MUTATIONS = [
    ("c < width", "c < width - 1"),
    ("acc *= tl.load", "acc += tl.load"),
    ("row * up_row", "row * gate_row + 1"),
    ("tl.program_id(1).to(tl.int64) * BLOCK", "tl.program_id(1).to(tl.int64) * 0"),
    ("0.13333334", "0.0"),
    ("tl.where(x < 0, -result, result)", "result"),
]


def check(
    rows: int, width: int, dtype: torch.dtype, activation: str, device: str = "cpu"
) -> torch.Tensor:
    """Gate and up are halves of one fused product."""
    fused = torch.randn(rows, 2 * width, device=device).to(dtype)
    gate, up = fused[:, :width], fused[:, width:]
    with poisoned():
        out = gated_activation(gate, up, activation=ACTIVATIONS[activation])
    expected = gated_activation_reference(gate, up, activation=ACTIVATIONS[activation])
    assert_near(out, expected)
    assert_near(out, DIALECT[activation](gate.float()) * up.float(), dtype)
    return out


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_of_the_dialect(activation: str, dtype: torch.dtype, device: str) -> None:
    check(3, 65, dtype, activation, device)


def test_the_table_is_the_dialects() -> None:
    assert sorted(ACTIVATIONS) == sorted(DIALECT)


@pytest.mark.parametrize(("rows", "width"), [(0, 5), (3, 0), (1, 1), (1, 1025)])
def test_empty_single_and_several_tiles(rows: int, width: int) -> None:
    check(rows, width, torch.float32, "silu")


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 4), st.integers(1, 70))
def test_any_shape(rows: int, width: int) -> None:
    check(rows, width, torch.float32, "gelu")


@pytest.mark.filterwarnings("ignore:overflow")  # of NumPy, where infinity is right
def test_extremes_stay_finite() -> None:
    far = torch.tensor([[-1e4, -90.0, -1e-4, 0.0, 1e-4, 90.0, 1e4]])
    for name, activation in ACTIVATIONS.items():
        out = gated_activation(far, torch.ones_like(far), activation=activation)
        expected = DIALECT[name](far)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-30, msg=name)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str) -> None:
    def everything() -> None:
        check(2, 1100, torch.float32, "tanh")

    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        everything()


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="up"):
        gated_activation(torch.randn(2, 3), torch.randn(2, 4), activation=None)


def test_cost() -> None:
    assert gated_activation_cost(torch.empty(2, 8)).bytes_moved == 3 * 16 * 4
