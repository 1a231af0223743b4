"""Column sums of attention probabilities against whole rows of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernel import KernelDescription
from codegen.triton_kernels.column_sums import (
    COLUMN_SUMS,
    column_sums,
    column_sums_cost,
    column_sums_reference,
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
    operator="column_sums", head_dim=16, group_size=2, mask="causal", form="sum"
)


def check(
    d: KernelDescription,
    kv_lens: list[int],
    device: str = DEVICE,
    *,
    num_kv_heads: int = 1,
    q_len: int = 1,
) -> None:
    """Run and compare; a row of an lse of -inf gives nothing."""
    cache = cached(d, kv_lens, num_kv_heads, device)
    lens = torch.tensor(kv_lens, device=device)
    q, _ = queries(d, len(kv_lens), num_kv_heads, lens, q_len)
    options = {"softmax_scale": d.head_dim**-0.5, "q_starts": lens - q_len}
    expected, lse = column_sums_reference(
        d, q, cache.k, index=cache.index, kv_lens=cache.kv_lens, **options
    )
    with poisoned():
        sums = column_sums(
            d,
            q,
            cache.k,
            lse,
            kv_lens=cache.kv_lens,
            k_positions=cache.k_positions,
            block_table=cache.block_table,
            **options,
        )
    assert sums.dtype == torch.float32
    assert_near(sums, expected)


@each_device
@pytest.mark.parametrize("kv_len", [1, 7, 63, 65])
@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_odd_lengths_and_groups(kv_len: int, group_size: int, device: str) -> None:
    check(replace(PLAIN, group_size=group_size, form="mean"), [kv_len], device, q_len=kv_len)


@each_device
@pytest.mark.parametrize("layout", ["bhsd", "slots", "paged"])
@pytest.mark.parametrize(
    "mask", ["full", "causal", "sliding_window", "chunked", "prefix", "local", "sinks_window"]
)
def test_masks_in_layouts(mask: str, layout: str, device: str) -> None:
    d = replace(PLAIN, mask=mask, span=12, num_sink_tokens=3, layout=layout, page_size=5)
    check(d, [66, 30, 0], device, q_len=40)


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, device: str) -> None:
    check(replace(PLAIN, dtype=dtype), [130, 7], device, q_len=80)


@each_device
def test_softcap_width_and_heads(device: str) -> None:
    check(replace(PLAIN, softcap=0.5, head_dim=40), [33, 40], device, num_kv_heads=2, q_len=9)


@settings(max_examples=8, deadline=None)
@given(
    lens=st.lists(st.integers(0, 60), min_size=1, max_size=2),
    group_size=st.sampled_from([1, 3, 4, 8]),
    q_len=st.integers(1, 40),
    layout=st.sampled_from(["bhsd", "slots", "paged"]),
    mask=st.sampled_from(["causal", "sliding_window", "chunked", "local", "sinks_window"]),
    span=st.integers(1, 40),
)
def test_any_shape(
    lens: list[int], group_size: int, q_len: int, layout: str, mask: str, span: int
) -> None:
    d = replace(PLAIN, group_size=group_size, layout=layout, mask=mask, span=span, page_size=4)
    check(replace(d, num_sink_tokens=2), lens, q_len=q_len)


@pytest.mark.parametrize("mask", ["full", "causal", "sliding_window", "chunked", "local"])
def test_tiles_without_entries_read_no_queries(mask: str) -> None:
    """The first request fills one tile of three, and most of its queries are padding."""
    check(replace(PLAIN, mask=mask, span=10, group_size=4), [8, 40], q_len=13)


def test_what_is_hidden_may_exceed_the_lse_by_far() -> None:
    q, k = torch.ones(1, 2, 3, 16, device=DEVICE), torch.ones(1, 1, 3, 16, device=DEVICE)
    k[:, :, 2] = 100.0  # only the last query sees it
    lse = torch.logsumexp(
        (q @ k.mT).masked_fill(torch.ones(3, 3, device=DEVICE).triu(1) > 0, -torch.inf), -1
    )
    sums = column_sums(PLAIN, q, k, lse, softmax_scale=1.0)
    assert_near(sums, torch.tensor([[[3.0, 1.0, 2.0]]], device=DEVICE))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("first < NUM_SINK_TOKENS, q_end", "first < 0, q_end"),
        ("tl.minimum(last + SPAN, q_end)", "tl.minimum(last + SPAN - 1, q_end)"),
        ("keep = keep & (j <= i) & ((i - j < SPAN)", "keep = keep & (j <= i) & ((i - j <= SPAN)"),
        ("kv_head * GROUP_SIZE + r % GROUP_SIZE", "kv_head * GROUP_SIZE"),
        ("start = tl.maximum(", "start = GROUP_SIZE + tl.maximum("),
        ("sums += tl.sum", "sums = tl.sum"),
        ("* LOG2_E", ""),
        ("sums / DIVISOR", "sums"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutations_are_noticed(old: str, new: str, dtype: torch.dtype) -> None:
    d = replace(PLAIN, mask="sinks_window", span=20, num_sink_tokens=3, form="mean", dtype=dtype)
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check(d, [220], q_len=180)


def test_what_does_not_fit_is_refused() -> None:
    q, k = torch.zeros(1, 2, 3, 16), torch.zeros(1, 1, 4, 16)
    with pytest.raises(InputError, match="lse"):
        column_sums(PLAIN, q, k, torch.zeros(1, 2, 4), softmax_scale=1.0)
    assert "form=''" in (COLUMN_SUMS.supports(replace(PLAIN, form="")) or "")


def test_cost_of_a_causal_square_is_half() -> None:
    full = column_sums_cost(replace(PLAIN, mask="full"), 1, 2, 1000, 1000).flops
    assert column_sums_cost(PLAIN, 1, 2, 1000, 1000).flops == pytest.approx(full / 2, rel=2e-3)
