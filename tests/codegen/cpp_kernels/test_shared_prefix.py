"""The C++ attention over a shared prefix against requests that each have a copy of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import codegen.cpp_kernels.shared_prefix as kernel
from codegen.cpp_kernels.shared_prefix import SharedPrefix, reference, shared_prefix
from codegen.kernel import KernelDescription
from rewriter.errors import InputError
from tests.codegen.cpp_kernels.running import ISA_CASES, mutate, needs_compiler, poisoned
from tests.codegen.tolerances import assert_near

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned")]
__all__ = ["poisoned"]


def describe(dtype: torch.dtype = torch.float32, **changes: Any) -> KernelDescription:
    told = {"operator": "shared_prefix", "dtype": dtype, "head_dim": 20, "mask": "causal"}
    return KernelDescription(**{**told, **changes})


def make(
    batch_size: int,
    heads: tuple[int, int],
    q_len: int,
    prefix_len: int,
    kv_len: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Requests of which some have no entries of their own yet."""
    generator = torch.Generator().manual_seed(prefix_len)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    positions = torch.randint(-1, kv_len, (batch_size, q_len), generator=generator)
    prefix = (normal(heads[1], prefix_len, 20), normal(heads[1], prefix_len, 20))
    own = [normal(batch_size, heads[1], kv_len, 20) for _ in range(2)]
    return normal(batch_size, heads[0], q_len, 20), *prefix, *own, positions


def check(
    d: KernelDescription, *tensors: Tensor, sinks: Tensor | None = None, **options: Any
) -> None:
    out, lse = shared_prefix(d, *tensors, softmax_scale=0.3, sinks=sinks, **options)
    expected, expected_lse = reference(*tensors, softmax_scale=0.3, sinks=sinks, softcap=d.softcap)
    assert out.dtype == d.dtype
    assert_near(out, expected)
    assert_near(lse, expected_lse)


@pytest.mark.parametrize(("isa", "dtype"), ISA_CASES)
def test_instruction_sets(isa: str, dtype: torch.dtype) -> None:
    for prefix_len in (1, 63, 130):
        for threads in (1, 2, 3):
            tensors = make(3, (6, 3), 1, prefix_len, 70, dtype)
            check(describe(dtype), *tensors, threads=threads, isa=isa)


@settings(deadline=None, max_examples=40)
@given(
    batch_size=st.integers(1, 5),
    num_kv_heads=st.integers(1, 3),
    group_size=st.sampled_from([1, 4, 8]),
    q_len=st.integers(1, 3),
    prefix_len=st.integers(0, 150),
    kv_len=st.integers(1, 100),
    threads=st.integers(1, 4),
    with_sinks=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
)
def test_shapes(
    batch_size: int,
    num_kv_heads: int,
    group_size: int,
    q_len: int,
    prefix_len: int,
    kv_len: int,
    threads: int,
    with_sinks: bool,
    softcap: float,
) -> None:
    heads = (num_kv_heads * group_size, num_kv_heads)
    tensors = make(batch_size, heads, q_len, prefix_len, kv_len)
    sinks = torch.linspace(-1, 1, heads[0]) if with_sinks else None
    if prefix_len == 0:
        tensors[-1].clamp_(min=0)  # position -1 + prefix_len would be padding
    check(describe(softcap=softcap), *tensors, sinks=sinks, threads=threads)


def test_whole_capacity_without_positions() -> None:
    *tensors, _ = make(2, (4, 2), 2, 50, 30)
    out, _ = shared_prefix(describe(), *tensors, softmax_scale=0.3)
    at = torch.tensor([[28, 29]]).expand(2, 2)
    assert_near(out, reference(*tensors, at, softmax_scale=0.3)[0])


def test_wrong_inputs() -> None:
    q, prefix_k, prefix_v, k, v, at = make(2, (4, 2), 1, 50, 30)
    with pytest.raises(InputError, match="prefix_v="):
        shared_prefix(describe(), q, prefix_k, prefix_v[:, 1:], k, v, at, softmax_scale=0.3)
    with pytest.raises(InputError, match="prefix_k="):
        shared_prefix(describe(), q, prefix_k.double(), prefix_v, k, v, at, softmax_scale=0.3)
    assert "mask" in str(SharedPrefix().supports(describe(mask="local")))


MUTATIONS = (
    ("folded + (head * shape.batch_size + b) * size", "folded + at * size"),
    ("int64_t folded = (head * shape.batch_size + b) * rows", "int64_t folded = row - row % rows"),
    ("(a * prefix[i] + c * suffix[i]) * scale", "(prefix[i] + suffix[i]) * scale"),
    ("shift + std::log(total)", "shift + total"),
    ("position >= last ? position + 1", "position >= last ? position"),
)


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(3, (6, 3), 1, 70, 30)
    check(describe(), *tensors)
    mutate(monkeypatch, kernel, old, new)
    with pytest.raises(AssertionError):
        check(describe(), *tensors)
    kernel._entry.cache_clear()
