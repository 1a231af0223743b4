from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen.cpp_kernels import gathered_mlp as kernel
from codegen.cpp_kernels.gathered_mlp import (
    GatheredMlp,
    cost,
    gathered_mlp,
    kept_above,
    kept_largest,
    reference,
    threshold_mlp,
    top_k_mlp,
)
from codegen.kernel import KernelDescription
from rewriter.dialect.mlp import ACTIVATIONS, gated_mlp
from rewriter.errors import ConfigError, InputError
from tests.codegen.cpp_kernels.running import RUNNABLE, mutate, needs_compiler, poisoned
from tests.codegen.tolerances import assert_near

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned")]
__all__ = ["poisoned"]

Block = tuple[Tensor, Tensor, Tensor, Tensor]


def block(
    intermediate_size: int, in_size: int, out_size: int, dtype: torch.dtype = torch.float32
) -> Block:
    """x, gate, up, down with results around 1; rows of gate and down are not adjacent."""
    torch.manual_seed(intermediate_size * 10_007 + in_size * 101 + out_size)
    x = torch.randn(1, in_size).to(dtype)
    gate = (torch.randn(intermediate_size, in_size + 2) / in_size**0.5).to(dtype)[:, :in_size]
    up = (torch.randn(intermediate_size, in_size) / in_size**0.5).to(dtype)
    down = (torch.randn(intermediate_size, out_size + 1) / intermediate_size**0.5).to(dtype)
    return x, gate, up, down[:, 1:]


def activated(x: Tensor, gate: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](x.float() @ gate.float().T)[0]


def check(weights: Block, keep: int, threads: int, activation: str = "silu", **isa: str) -> None:
    """All three forms at one number of neurons."""
    x, gate, _, _ = weights
    given_ = torch.randperm(gate.shape[0])[:keep]
    options: dict[str, Any] = {"activation": activation, "threads": threads, **isa}
    expected = reference(*weights, given_, activation=activation)
    assert_near(gathered_mlp(*weights, given_, **options), expected)
    gated = activated(x, gate, activation)
    ordered = torch.cat([gated.abs().sort(descending=True).values, torch.full((1,), -1.0)])
    if keep and ordered[keep - 1] - ordered[keep] <= 1e-6 * ordered[keep]:
        return  # which of two equal neurons is kept is not said
    largest = kept_largest(gated, keep)
    expected = reference(*weights, largest, activation=activation)
    assert_near(top_k_mlp(*weights, keep, **options), expected)
    threshold = ordered[keep - 1 : keep + 1].mean().item() if keep else float("inf")
    assert kept_above(gated, threshold).tolist() == largest.tolist()
    assert_near(threshold_mlp(*weights, threshold, **options), expected)


@pytest.mark.parametrize("isa", RUNNABLE)
def test_instruction_sets(isa: str) -> None:
    for sizes in ((1, 1, 1), (7, 63, 65), (65, 7, 1), (130, 600, 33)):
        weights = block(*sizes)
        for threads in (1, 2, 3):
            for keep in {0, 1, sizes[0] // 2, sizes[0]}:
                check(weights, keep, threads, isa=isa)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 140), st.integers(1, 140)),
    density=st.floats(0, 1),
    threads=st.integers(1, 3),
)
def test_shapes_bf16(sizes: tuple[int, int, int], density: float, threads: int) -> None:
    check(block(*sizes, dtype=torch.bfloat16), round(density * sizes[0]), threads)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS.keys() - {"silu"}))
def test_activations(activation: str) -> None:
    weights = block(40, 30, 20)
    indices = torch.arange(0, 40, 3)
    actual = gathered_mlp(*weights, indices, activation=activation, threads=2)
    assert_near(actual, reference(*weights, indices, activation=activation))


def test_all_neurons_are_the_dense_block() -> None:
    x, gate, up, down = block(50, 30, 20)
    expected = gated_mlp.reference(x, gate, up, down.T, activation="silu")
    assert_near(gathered_mlp(x, gate, up, down, torch.arange(50), activation="silu"), expected)
    assert_near(top_k_mlp(x, gate, up, down, 99, activation="silu"), expected)
    assert_near(threshold_mlp(x, gate, up, down, -1.0, activation="silu"), expected)


def test_indices_of_either_width_in_any_order_and_twice() -> None:
    weights = block(20, 30, 10)
    indices = torch.tensor([7, 3, 3, 19, 0])
    expected = reference(*weights, indices, activation="silu")
    for given_ in (indices, indices.int(), torch.stack([indices, indices], dim=1)[:, 0]):
        assert_near(gathered_mlp(*weights, given_, activation="silu", threads=2), expected)


def test_equal_magnitudes_keep_the_first() -> None:
    weights = list(block(64, 16, 8))
    weights[1] = weights[1][:1].repeat(64, 1) * torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    weights[1][40:50] *= 2
    x, gate, up, down = weights
    for keep in (5, 10, 13, 41):
        gated = activated(x, gate, "identity")
        expected = reference(*weights, kept_largest(gated, keep), activation="identity")
        actual = top_k_mlp(x, gate, up, down, keep, activation="identity", threads=2)
        assert_near(actual, expected)


@pytest.mark.parametrize("spread", [1e-30, 1e-3, 1e30])
def test_magnitudes_of_every_size(spread: float) -> None:
    x, gate, up, down = block(3000, 1, 4)
    gate = gate.contiguous() * spread
    up = up / spread
    gated = activated(x, gate, "identity")
    for keep in (1, 700, 2999):
        expected = reference(x, gate, up, down, kept_largest(gated, keep), activation="identity")
        actual = top_k_mlp(x, gate, up, down, keep, activation="identity", threads=2)
        assert_near(actual, expected)


def test_nan_is_seen() -> None:
    x, gate, up, down = block(20, 30, 10)
    gate[4, 3] = float("nan")
    assert top_k_mlp(x, gate, up, down, 1, activation="silu").isnan().all()
    assert threshold_mlp(x, gate, up, down, 100.0, activation="silu").isnan().all()
    others = torch.tensor([0, 1, 5])
    assert gathered_mlp(x, gate, up, down, others, activation="silu").isfinite().all()


def test_unread_neurons_do_not_matter() -> None:
    x, gate, up, down = block(20, 30, 10)
    indices = torch.tensor([2, 11])
    expected = gathered_mlp(x, gate, up, down, indices, activation="silu")
    rest = torch.ones(20, dtype=torch.bool).index_fill(0, indices, False)
    for weight in (gate, up, down):
        weight[rest] = float("nan")
    assert torch.equal(gathered_mlp(x, gate, up, down, indices, activation="silu"), expected)


def test_wrong_inputs() -> None:
    x, gate, up, down = block(20, 30, 10)
    some = torch.tensor([1, 2])
    wrong: tuple[tuple[tuple[Tensor, ...], str], ...] = (
        ((x, gate, up, down, torch.tensor([1, 20])), "0 to 19"),
        ((x, gate, up, down, torch.tensor([-1])), "0 to 19"),
        ((x, gate, up, down, some.float()), "indices="),
        ((x, gate, up, down, some[None]), "indices="),
        ((x, gate, up[:19], down, some), "weights="),
        ((x, gate, up, down[:19], some), "weights="),
        ((x, gate, up, down.T.contiguous().T, some), "one element apart"),
        ((x, gate, up.bfloat16(), down, some), "one dtype"),
        ((x.expand(2, 30), gate, up, down, some), "one token"),
        ((x[:, :29], gate, up, down, some), "one token"),
        ((x.half(), gate, up, down, some), "float32 or bfloat16"),
        ((x, gate, up, down.to("meta"), some), "CPU"),
    )
    for arguments, told in wrong:
        with pytest.raises(InputError, match=told):
            gathered_mlp(*arguments, activation="silu")
    with pytest.raises(ConfigError, match="swish"):
        gathered_mlp(x, gate, up, down, some, activation="swish")


def test_supports_and_source() -> None:
    def describe(**fields: Any) -> KernelDescription:
        return KernelDescription(operator="gathered_mlp", **fields)

    supports = GatheredMlp().supports
    assert supports(describe(form="silu:top_k", weight_dtype=torch.bfloat16)) is None
    assert "dtype=float16" in str(supports(describe(form="silu:top_k", dtype=torch.half)))
    assert "weight_dtype=int8" in str(
        supports(describe(form="silu:top_k", weight_dtype=torch.int8))
    )
    assert "form='silu:some'" in str(supports(describe(form="silu:some")))
    fine = describe(form="silu:threshold")
    assert GatheredMlp().source(fine) == GatheredMlp().source(fine)


def test_cost() -> None:
    x, gate, _, down = block(40, 30, 20)
    given_ = cost(x, gate, down, 10, gate_is_dense=False)
    dense = cost(x, gate, down, 10, gate_is_dense=True)
    assert given_.flops == 2 * 10 * (30 + 30 + 20)
    assert dense.bytes_moved - given_.bytes_moved == 30 * 30 * 4


MUTATIONS = (
    ("int64_t index = list[i >> 1];", "int64_t index = i >> 1;"),
    ("w.up + index * w.up_stride : w.gate", "w.gate + index * w.gate_stride : w.gate"),
    ("w.down + int64_t(list[p]) * w.down_stride", "w.down + p * w.down_stride"),
    ("w.up + int64_t(list[p]) * w.up_stride", "w.up + p * w.up_stride"),
    ("partial[c] = 0", "partial[c] += 0"),
    ("total += factor[r] * load_weights(rows[r] + c)", "total = factor[r] * load_weights(rows[r] + c)"),
    ("c = rest; c < columns; ++c)\n        for (int r = 0; r < R; ++r) y", "c = rest; c < 0; ++c)\n"
     "        for (int r = 0; r < R; ++r) y"),
    ("factors + i, y", "factors, y"),
    ("sweep_add<R / 2>(i,", "sweep_add<R / 2>(i + 1,"),
    ("bits & 0x7fffffffu", "bits & 0x7ff00000u"),
    ("list[at] = int32_t(i);", "list[at] = int32_t(at);"),
    ("wanted = count;", "wanted = count + 1;"),
    ("total += partial[t * out_size + c]", "total += 0 * partial[t * out_size + c]"),
    ("gated[i] = activation(gate)", "gated[i] = gate"),
)  # fmt: skip
"""Each must make the comparison below fail: text that is there, and what takes its place.

The first two are of the form with given indices; all others are looked for in the text of any form.
"""


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = block(45, 157, 75)

    def compare() -> None:
        x, gate, up, down = weights
        options: dict[str, Any] = {"activation": "silu", "threads": 2}
        if old in MUTATIONS[0] + MUTATIONS[1]:
            indices = torch.arange(44, 0, -2)
            expected = reference(*weights, indices, activation="silu")
            return assert_near(gathered_mlp(*weights, indices, **options), expected)
        expected = reference(
            *weights, kept_largest(activated(x, gate, "silu"), 21), activation="silu"
        )
        return assert_near(top_k_mlp(x, gate, up, down, 21, **options), expected)

    compare()
    mutate(monkeypatch, kernel, old, new)
    with pytest.raises(AssertionError):
        compare()
    kernel._entry.cache_clear()
