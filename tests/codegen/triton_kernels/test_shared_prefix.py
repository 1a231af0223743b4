"""Attention over a shared prefix and own suffixes against one softmax over both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernel import KernelDescription
from codegen.triton_kernels.decode_attention import decode_cost
from codegen.triton_kernels.shared_prefix import (
    SHARED_PREFIX,
    shared_prefix_attention,
    shared_prefix_cost,
    shared_prefix_reference,
)
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import (
    DEVICE,
    cached,
    each_device,
    mutated,
    poisoned,
    queries,
)

PLAIN = KernelDescription(
    operator="shared_prefix_attention", head_dim=16, group_size=2, mask="causal"
)


def check(
    d: KernelDescription,
    prefix_len: int,
    kv_lens: list[int],
    device: str = DEVICE,
    *,
    num_kv_heads: int = 2,
    q_len: int = 1,
    num_splits: tuple[int, int] | None = None,
) -> None:
    """Run and compare out and lse; a request without a suffix asks from position 0."""
    cache = cached(d, kv_lens, num_kv_heads, device)
    lens = torch.tensor(kv_lens, device=device)
    q, positions = queries(d, len(kv_lens), num_kv_heads, lens, q_len)
    positions = torch.where((lens == 0).unsqueeze(1), 0, positions)
    prefix = [
        torch.randn(num_kv_heads, prefix_len, n, device=device).to(d.dtype)
        for n in (d.head_dim, d.value_dim or d.head_dim)
    ]
    given_tensors = (q, *prefix, cache.k, cache.v, positions)
    scale = d.head_dim**-0.5
    with poisoned():
        out, lse = shared_prefix_attention(
            d,
            *given_tensors,
            softmax_scale=scale,
            kv_lens=cache.kv_lens,
            k_positions=cache.k_positions,
            block_table=cache.block_table,
            num_splits=num_splits,
        )
    expected, expected_lse = shared_prefix_reference(
        d, *given_tensors, softmax_scale=scale, index=cache.index, kv_lens=cache.kv_lens
    )
    assert out.dtype == d.dtype
    assert_near(out, expected)
    assert_near(lse, expected_lse)


@each_device
@pytest.mark.parametrize("prefix_len", [1, 7, 63, 65])
@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_odd_lengths_and_groups(prefix_len: int, group_size: int, device: str) -> None:
    check(replace(PLAIN, group_size=group_size), prefix_len, [5, 12, 1], device, num_kv_heads=1)


@each_device
@pytest.mark.parametrize("layout", ["bhsd", "slots", "paged"])
def test_layouts_of_suffixes(layout: str, device: str) -> None:
    d = replace(PLAIN, layout=layout, page_size=5)
    check(d, 40, [33, 0, 7], device, q_len=3, num_splits=(2, 2))


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, device: str) -> None:
    check(replace(PLAIN, dtype=dtype, value_dim=24), 130, [3, 70], device)


@settings(max_examples=6, deadline=None)
@given(
    prefix_len=st.integers(1, 70),
    lens=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    group_size=st.sampled_from([1, 3, 8]),
    q_len=st.integers(1, 3),
    softcap=st.sampled_from([0.0, 1.0]),
)
def test_any_shape(
    prefix_len: int, lens: list[int], group_size: int, q_len: int, softcap: float
) -> None:
    d = replace(PLAIN, group_size=group_size, softcap=softcap)
    check(d, prefix_len, lens, num_kv_heads=1, q_len=q_len)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(request + r // (q_len * GROUP_SIZE))", "(request)"),
        ("r // q_len % GROUP_SIZE", "r % GROUP_SIZE"),
        ("acc = acc * shrink[:, None]", "acc = acc"),
        ("peak + tl.log2(total)", "tl.log2(total)"),
        ("scores = tl.where(keep, scores", "scores = tl.where(keep | True, scores"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutations_are_noticed(old: str, new: str, dtype: torch.dtype) -> None:
    d = replace(PLAIN, dtype=dtype, group_size=4)
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check(d, 150, [4, 90], q_len=2)


def test_what_does_not_fit_is_refused() -> None:
    q, k = torch.zeros(2, 2, 1, 16), torch.zeros(2, 1, 4, 16)
    with pytest.raises(InputError, match="prefix"):
        shared_prefix_attention(PLAIN, q, k, k, k, k, softmax_scale=1.0)
    refusal = SHARED_PREFIX.supports(replace(PLAIN, mask="sliding_window", span=4))
    assert "allowed: 'causal', 'full'" in (refusal or "")


def test_cost_reads_the_prefix_once() -> None:
    shared = shared_prefix_cost(PLAIN, 16, 4, 1, 4000, 10)
    assert shared.bytes_moved < decode_cost(PLAIN, 16, 4, 1, 4010).bytes_moved / 10
    assert shared.flops == decode_cost(PLAIN, 16, 4, 1, 4010).flops
    assert shared.launches == 3
