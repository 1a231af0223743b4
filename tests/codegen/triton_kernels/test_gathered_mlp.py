"""Feed-forward blocks on some of their neurons."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.epilogue import Epilogue, Operand, Step
from codegen.kernel import KernelDescription
from codegen.triton_kernels.gathered_mlp import (
    DOWN,
    UP,
    gathered_down,
    gathered_down_reference,
    gathered_mlp_cost,
    gathered_up,
    gathered_up_reference,
)
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import each_device, mutated, poisoned

SILU = Epilogue((Step("silu", ("value",)),))
RESIDUAL = Epilogue(
    (Step("add", ("value", "element_0")),), (Operand("element_0", "element", torch.float32),)
)
MUTATIONS = [
    ("n = tl.load(neurons + row * neurons_row + s, mask=inside, other=-1).to(tl.int64)", "n = s"),
    ("active = n >= 0", "active = n >= 1"),
    ("gated = silu(gated)", "gated = gated"),
    ("at < hidden_size", "at < hidden_size - 1"),
    ("gate_sum += g", "gate_sum = g"),
    ("tl.abs(gated) > threshold", "tl.abs(gated) < threshold"),
    ("acc += h", "acc = h"),
    ("range(split * share", "range(0 * share"),
    ("range(NUM_SPLITS)", "range(NUM_SPLITS - 15)"),
    ("acc = acc + element_0", "acc = acc"),
]


def neurons_of(rows: int, budget: int, intermediate_size: int, device: str) -> torch.Tensor:
    """Different ones for every row; some are missing."""
    order = [torch.randperm(intermediate_size)[:budget] for _ in range(rows)]
    chosen = torch.stack(order) if rows else torch.empty(0, budget)
    if budget > 3:
        chosen[:, 0], chosen[:, 1] = 0, -1
    return chosen.int().to(device)


def check(
    rows: int,
    budget: int,
    intermediate_size: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Rows of the weights that are not chosen hold NaN."""
    x = torch.randn(rows, hidden_size, device=device).to(dtype)
    shape = (3, intermediate_size, hidden_size)
    gate, up, down = (torch.randn(shape, device=device) / hidden_size**0.5).to(dtype)
    neurons = neurons_of(rows, budget, intermediate_size, device)
    unread = torch.ones(intermediate_size, dtype=torch.bool, device=device)
    unread[neurons[neurons >= 0].long()] = False
    residual = torch.randn(rows, hidden_size, device=device)
    expected = gathered_up_reference(x, gate, up, neurons, activation=SILU)
    given = {"epilogue": RESIDUAL, "operands": (residual,)}
    expected_out = gathered_down_reference(expected, down, neurons, **given)
    for weight in (gate, up, down):
        weight[unread] = torch.nan
    with poisoned():
        hidden = gathered_up(x, gate, up, neurons, activation=SILU)
        out = gathered_down(expected, down, neurons, **given)
    assert_near(hidden, expected)
    assert_near(out, expected_out)


def check_threshold(
    rows: int, count: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Rows of the weights that no row of x needs hold NaN."""
    x = torch.randn(rows, width, device=device).to(dtype)
    gated = torch.randn(rows, count, device=device).to(dtype)
    gated[:, ::3] = 0.25
    up, down = (torch.randn(2, count, width, device=device) / width**0.5).to(dtype)
    expected = gathered_up_reference(x, gated, up, threshold=0.5)
    expected_out = gathered_down_reference(expected, down)
    up[::3], down[::3] = torch.nan, torch.nan
    with poisoned():
        hidden = gathered_up(x, gated, up, threshold=0.5)
        out = gathered_down(expected, down)
    assert_near(hidden, expected)
    assert_near(out, expected_out)


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 65), (2, 7)])
def test_chosen_neurons(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    check(rows, 33, 63, width, dtype, device)


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neurons_above_a_threshold(dtype: torch.dtype, device: str) -> None:
    check_threshold(2, 65, 63, dtype, device)


@pytest.mark.parametrize(("rows", "budget"), [(0, 3), (1, 0), (2, 1)])
def test_empty_and_single(rows: int, budget: int) -> None:
    check(rows, budget, 5, 3)


def test_one_choice_for_all_rows() -> None:
    x, (gate, up) = torch.randn(2, 9), torch.randn(2, 20, 9)
    shared = neurons_of(1, 6, 20, "cpu")
    each = shared.expand(2, -1).contiguous()
    one, other = (gathered_up(x, gate, up, n, activation=SILU) for n in (shared, each))
    assert torch.equal(one, other)


def test_all_neurons_are_the_dense_block() -> None:
    x, (gate, up, down) = torch.randn(1, 9), torch.randn(3, 20, 9) / 3
    everyone = torch.arange(20, dtype=torch.int32).unsqueeze(0)
    hidden = gathered_up(x, gate, up, everyone, activation=SILU)
    dense = torch.nn.functional.silu(x @ gate.T) * (x @ up.T) @ down
    assert_near(gathered_down(hidden, down, everyone), dense)


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30))
def test_any_shape(budget: int, width: int) -> None:
    check(1, budget, 30, width)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str) -> None:
    def everything() -> None:
        check(1, 300, 310, 515)
        check_threshold(1, 65, 63, torch.float32)

    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        everything()


def test_what_is_refused() -> None:
    x, weight = torch.randn(2, 4), torch.randn(6, 4)
    neurons = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(InputError, match=r"neurons: int32 \[2 or 1, budget\]"):
        gathered_up(x, weight, weight, neurons.long())
    with pytest.raises(InputError, match="do not fit x"):
        gathered_up(x, weight[:, :3].contiguous(), weight, neurons)
    with pytest.raises(InputError, match="4 neurons where 3"):
        gathered_down(torch.randn(2, 4), weight, neurons)
    bad = KernelDescription(operator="gathered_up", form="threshold", epilogue=SILU)
    assert "activated already" in (UP.supports(bad) or "")
    assert "form='other'" in (DOWN.supports(KernelDescription(operator="x", form="other")) or "")


def test_cost_counts_active_neurons() -> None:
    assert gathered_mlp_cost(2, 10, 8, 2).bytes_moved == 3 * 2 * 10 * 8 * 2
