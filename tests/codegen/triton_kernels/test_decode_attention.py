"""Decode attention against its reference, in all layouts and masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernel import KernelDescription
from codegen.triton_kernels.decode_attention import (
    DECODE_ATTENTION,
    decode_attention,
    decode_cost,
    decode_reference,
)
from rewriter.dialect.attention import attention
from rewriter.errors import ConfigError, InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import (
    DEVICE,
    cached,
    each_device,
    mutated,
    poisoned,
    queries,
)

PLAIN = KernelDescription(operator="decode_attention", head_dim=16, group_size=2, mask="causal")


def check(
    d: KernelDescription,
    kv_lens: list[int],
    device: str = DEVICE,
    *,
    num_kv_heads: int = 2,
    q_len: int = 1,
    num_splits: int = 1,
) -> None:
    """Run and compare out and lse."""
    cache = cached(d, kv_lens, num_kv_heads, device)
    lens = torch.tensor(kv_lens, device=device)
    q, positions = queries(d, len(kv_lens), num_kv_heads, lens, q_len)
    scale = d.head_dim**-0.5
    with poisoned():
        out, lse = decode_attention(
            d,
            q,
            cache.k,
            cache.v,
            positions,
            softmax_scale=scale,
            kv_lens=cache.kv_lens,
            k_positions=cache.k_positions,
            block_table=cache.block_table,
            num_splits=num_splits,
        )
    expected, expected_lse = decode_reference(
        d,
        q,
        cache.k,
        cache.v,
        positions,
        softmax_scale=scale,
        index=cache.index,
        kv_lens=cache.kv_lens,
    )
    assert out.dtype == d.dtype
    assert_near(out, expected)
    assert_near(lse, expected_lse)


@each_device
@pytest.mark.parametrize("kv_len", [1, 7, 63, 65])
@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_odd_lengths_and_groups(kv_len: int, group_size: int, device: str) -> None:
    d = replace(PLAIN, group_size=group_size)
    check(d, [kv_len], device, q_len=3 if group_size == 8 else 1, num_kv_heads=1)


@each_device
@pytest.mark.parametrize("layout", ["bhsd", "slots", "paged"])
@pytest.mark.parametrize(
    "mask", ["full", "causal", "sliding_window", "chunked", "prefix", "local", "sinks_window"]
)
def test_masks_in_layouts(mask: str, layout: str, device: str) -> None:
    d = replace(PLAIN, mask=mask, span=20, num_sink_tokens=3, layout=layout, page_size=5)
    check(d, [66, 30, 0], device, num_kv_heads=1, q_len=2, num_splits=2)


@each_device
@pytest.mark.parametrize("layout", ["bhsd", "paged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, layout: str, device: str) -> None:
    check(replace(PLAIN, dtype=dtype, layout=layout, page_size=16), [130, 7], device, num_splits=2)


@each_device
def test_softcap_and_widths(device: str) -> None:
    d = replace(PLAIN, softcap=0.5, head_dim=40, value_dim=24)
    check(d, [33, 40], device, q_len=2)


@each_device
def test_more_splits_than_tiles(device: str) -> None:
    check(PLAIN, [40, 1], device, num_splits=5)


@settings(max_examples=8, deadline=None)
@given(
    lens=st.lists(st.integers(0, 70), min_size=1, max_size=2),
    group_size=st.sampled_from([1, 3, 4, 8]),
    q_len=st.integers(1, 3),
    layout=st.sampled_from(["bhsd", "slots", "paged"]),
    mask=st.sampled_from(["causal", "sliding_window", "sinks_window"]),
    splits=st.integers(1, 3),
)
def test_any_shape(
    lens: list[int], group_size: int, q_len: int, layout: str, mask: str, splits: int
) -> None:
    d = replace(PLAIN, group_size=group_size, layout=layout, mask=mask, span=9, num_sink_tokens=2)
    check(replace(d, page_size=4), lens, num_kv_heads=1, q_len=q_len, num_splits=splits)


def test_nothing_seen_is_zero_and_minus_infinity() -> None:
    q = torch.randn(1, 2, 1, 16, device=DEVICE)
    k = torch.full((1, 1, 4, 16), torch.nan, device=DEVICE)
    empty = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with poisoned():
        out, lse = decode_attention(PLAIN, q, k, k, softmax_scale=1.0, kv_lens=empty)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("keep = keep & (j <= i) & (i - j < SPAN)", "keep = keep & (j <= i) & (i - j <= SPAN)"),
        ("acc = acc * shrink[:, None]", "acc = acc"),
        ("total * shrink + tl.sum(weights, 1)", "total + tl.sum(weights, 1)"),
        ("low = tl.maximum(first - SPAN + 1, 0)", "low = tl.maximum(first - SPAN + 2, 0)"),
        ("r // q_len % GROUP_SIZE", "r % GROUP_SIZE"),
        ("start = split * share", "start = split * share + 1"),
        (") * softmax_scale", ")"),
        ("tl.log2(total)", "total"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutations_are_noticed(old: str, new: str, dtype: torch.dtype) -> None:
    d = replace(PLAIN, mask="sliding_window", span=150, group_size=4, dtype=dtype)
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check(d, [160, 200], num_kv_heads=1, q_len=2, num_splits=2)


@pytest.mark.parametrize(
    ("mask", "old", "new"),
    [
        ("causal", "keep = keep & (j <= i)", "keep = keep & (j < i)"),
        ("causal", "high = tl.minimum(last + 1, kv_len)", "high = tl.minimum(last, kv_len)"),
        ("chunked", "low = first // SPAN * SPAN", "low = (first // SPAN + 1) * SPAN"),
        ("chunked", "& (i // SPAN == j // SPAN)", ""),
        ("prefix", "(j < SPAN)", "(j <= SPAN)"),
        ("prefix", "tl.maximum(last + 1, SPAN)", "last + 1"),
        ("local", "(i - j <= SPAN)", "(i - j < SPAN)"),
        ("local", "low = tl.maximum(first - SPAN, 0)", "low = tl.maximum(first - SPAN + 1, 0)"),
        ("local", "high = tl.minimum(last + SPAN + 1, kv_len)", "high = last"),
        ("sinks_window", "pinned = tl.minimum(low, NUM_SINK_TOKENS)", "pinned = low * 0"),
        ("full", "keep = (i >= 0) & (j >= 0)", "keep = (j >= 0)"),
    ],
)
def test_mutated_masks_are_noticed(mask: str, old: str, new: str) -> None:
    """Queries at 12, 16 and 25 of 60 entries, and a request of which two are padding."""
    d = replace(PLAIN, mask=mask, span=8 if mask != "prefix" else 20, num_sink_tokens=2)
    q, cache = torch.randn(2, 4, 3, 16), cached(d, [60, 60], 2, DEVICE)
    positions = torch.tensor([[12, 16, 25], [-1, -1, 0]], device=DEVICE)
    options = {"softmax_scale": 0.25, "kv_lens": cache.kv_lens}
    given_tensors = (d, q.to(DEVICE), cache.k, cache.v, positions)
    expected, _ = decode_reference(*given_tensors, index=cache.index, **options)
    assert_near(decode_attention(*given_tensors, **options)[0], expected)
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        assert_near(decode_attention(*given_tensors, **options)[0], expected)


@pytest.mark.parametrize("shape", [(2, 9), (2, 1, 9)])
def test_heads_share_positions_in_32_bits(shape: tuple[int, ...]) -> None:
    d = replace(PLAIN, layout="slots")
    q, k = torch.randn(2, 4, 1, 16, device=DEVICE), torch.randn(2, 2, 9, 16, device=DEVICE)
    positions = torch.arange(8, -1, -1, dtype=torch.int32, device=DEVICE).expand(shape).contiguous()
    now = torch.tensor([[4], [6]], dtype=torch.int32, device=DEVICE)
    out, _ = decode_attention(d, q, k, k, now, softmax_scale=1.0, k_positions=positions)
    lens = torch.full((2,), 9, device=DEVICE)
    expected, _ = decode_reference(
        d, q, k, k, now, softmax_scale=1.0, index=positions, kv_lens=lens
    )
    assert_near(out, expected)


@pytest.mark.parametrize("mask", ["full", "causal", "sliding_window", "chunked", "prefix", "local"])
def test_reference_is_the_dialect_operator(mask: str) -> None:
    d = replace(PLAIN, mask=mask, span=5, softcap=2.0)
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    positions = torch.tensor([[9, 12, 19], [-1, 0, 1]])
    lens = torch.full((2,), 20)
    out, _ = decode_reference(d, q, k, v, positions, softmax_scale=0.3, index=lens, kv_lens=lens)
    expected = attention.reference(
        q, k, v, positions, softmax_scale=0.3, mask=mask, span=5, softcap=2.0
    )
    assert_near(out, expected)


def test_text_is_reproducible_and_refuses() -> None:
    assert DECODE_ATTENTION.source(PLAIN) == DECODE_ATTENTION.source(replace(PLAIN))
    assert "HEAD_DIM: tl.constexpr = 16" in DECODE_ATTENTION.source(PLAIN)
    assert "mask='other'" in (DECODE_ATTENTION.supports(replace(PLAIN, mask="other")) or "")
    with pytest.raises(ConfigError, match="head_dim=300, allowed: 1 to 256"):
        DECODE_ATTENTION.source(replace(PLAIN, head_dim=300))


def test_wrong_tensors_are_refused() -> None:
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 4, 16)
    with pytest.raises(InputError, match="last 16"):
        decode_attention(PLAIN, q[..., :8], k, k, softmax_scale=1.0)
    with pytest.raises(InputError, match="k_positions"):
        decode_attention(replace(PLAIN, layout="slots"), q, k, k, softmax_scale=1.0)
    with pytest.raises(InputError, match="kv_lens"):
        decode_attention(PLAIN, q, k, k, softmax_scale=1.0, kv_lens=torch.zeros(2).long())
    with pytest.raises(InputError, match="pages of 4"):
        paged = replace(PLAIN, layout="paged", page_size=8)
        decode_attention(paged, q, k, k, softmax_scale=1.0, block_table=torch.zeros(1, 1).long())


def test_cost_counts_what_the_window_leaves() -> None:
    d = replace(PLAIN, mask="sliding_window", span=100)
    assert decode_cost(d, 1, 4, 1, 5000).flops == decode_cost(PLAIN, 1, 4, 1, 100).flops
