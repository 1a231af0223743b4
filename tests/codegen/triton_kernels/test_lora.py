"""Adapters chosen row by row, dense and gathered from shards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.epilogue import Epilogue, Operand, Step
from codegen.triton_kernels.lora import (
    Adapters,
    lora,
    lora_cost,
    lora_reference,
    pack_adapters,
)
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import each_device, mutated, poisoned

BIAS = Epilogue(
    (Step("add", ("value", "column_0")),), (Operand("column_0", "column", torch.float32),)
)
MUTATIONS = [
    ("adapter >= 0, rank", "adapter >= 1, rank"),
    ("(adapter * rank + j) * chunks + chunk", "(adapter * rank + j) * chunks"),
    ("chunk * shard_width + k", "k"),
    ("part % pieces * PIECE", "0"),
    ("k < shard_width", "k < shard_width - 1"),
    ("n < shard_width", "n < shard_width - 1"),
    ("range(parts)", "range(parts - 1)"),
    ("acc += a.to", "acc = a.to"),
    ("scaling + tl.maximum(adapter, 0)", "scaling"),
    ("acc += scale", "acc = scale"),
    ("acc = acc + column_0", "acc = acc"),
    ("shard[:, None] * pool_row", "j[:, None] * pool_row"),
]


def dense(ranks: list[int], width: int, out: int, dtype: torch.dtype, device: str) -> Adapters:
    """One adapter for each rank."""
    made = [
        (torch.randn(r, width) / width**0.5, torch.randn(out, r) / r**0.5, 0.5 + r) for r in ranks
    ]
    return pack_adapters([(a.to(device, dtype), b.to(device, dtype), s) for a, b, s in made])


def sharded(
    width: int, out: int, a_chunks: int, b_chunks: int, rank: int = 4, device: str = "cpu"
) -> Adapters:
    """Three adapters with random shards, one of which is missing; unused shards hold NaN."""

    def part(features: int, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
        pool = torch.randn(40, features // chunks) / features**0.5
        index = torch.stack([torch.randperm(40)[: rank * chunks] for _ in range(3)])
        index[1, -1] = -1
        unused = torch.ones(40, dtype=torch.bool)
        unused[index[index >= 0]] = False
        pool[unused] = torch.nan
        return pool.to(device), index.view(3, rank, chunks).int().to(device)

    scaling = torch.tensor([0.5, 1.0, 4.0], device=device)
    return Adapters(*part(width, a_chunks), *part(out, b_chunks), scaling)


def check(adapters: Adapters, ids: list[int], dtype: torch.dtype, device: str = "cpu") -> None:
    width = adapters.a_pool.shape[1] * adapters.a_index.shape[2]
    out_features = adapters.b_pool.shape[1] * adapters.b_index.shape[2]
    x = torch.randn(len(ids), width, device=device).to(dtype)
    base = torch.randn(len(ids), out_features, device=device).to(dtype)
    bias = torch.randn(out_features, device=device)
    rows = torch.tensor(ids, dtype=torch.int32, device=device)
    given = {"epilogue": BIAS, "operands": (bias,)}
    expected = lora_reference(x, base, adapters, rows, **given)
    with poisoned():
        out = lora(x, base, adapters, rows, **given)
    assert_near(out, expected)


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_adapters_of_different_ranks(dtype: torch.dtype, device: str) -> None:
    adapters = dense([1, 8, 3], 65, 63, dtype, device)
    for ids in ([2], [0, 1, 2, -1, 1], [-1, -1], []):
        check(adapters, ids, dtype, device)


@each_device
@pytest.mark.parametrize("chunks", [(1, 1), (4, 2), (2, 7)])
def test_shards_of_a_pool(chunks: tuple[int, int], device: str) -> None:
    check(sharded(64, 70, *chunks, device=device), [2, -1, 0, 1], torch.float32, device)


def test_a_pool_of_another_dtype() -> None:
    check(sharded(64, 70, 2, 2), [1, 0], torch.bfloat16)


def test_packing_keeps_the_product() -> None:
    a, b = torch.randn(3, 9), torch.randn(7, 3)
    x, base = torch.randn(2, 9), torch.randn(2, 7)
    out = lora(x, base, pack_adapters([(a, b, 2.0)]), torch.zeros(2, dtype=torch.int32))
    assert_near(out, base + 2 * x @ a.T @ b.T)


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 70))
def test_any_shape(rank: int, width: int, out_features: int) -> None:
    check(dense([rank, 1], width, out_features, torch.float32, "cpu"), [1, -1, 0], torch.float32)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str) -> None:
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check(sharded(1300, 140, 2, 2), [0, 2, -1], torch.float32)


def test_what_is_refused() -> None:
    adapters, x, ids = sharded(8, 6, 2, 2), torch.randn(2, 8), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(InputError, match="2 shards of 4 where 9 values"):
        lora(torch.randn(2, 9), torch.randn(2, 6), adapters, ids)
    with pytest.raises(InputError, match="adapter_ids"):
        lora(x, torch.randn(2, 6), adapters, ids.long())
    with pytest.raises(InputError, match="a rank of 1 to 128"):
        lora(x, torch.randn(2, 6), dense([129], 8, 6, torch.float32, "cpu"), ids)


def test_cost() -> None:
    assert lora_cost(torch.empty(1, 8), torch.empty(1, 8), 4).flops == 2 * 4 * 16
