"""Prefill attention against its reference; tiles that it should skip hold NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.epilogue import Epilogue, Operand, Step
from codegen.kernel import KernelDescription
from codegen.triton_kernels.prefill_attention import (
    PREFILL_ATTENTION,
    config_for,
    prefill_attention,
    prefill_cost,
    prefill_reference,
)
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import DEVICE, each_device, mutated, poisoned

PLAIN = KernelDescription(operator="prefill_attention", head_dim=16, group_size=2, mask="causal")


def check(
    d: KernelDescription,
    q_len: int,
    kv_len: int,
    device: str = DEVICE,
    *,
    num_kv_heads: int = 1,
    starts: tuple[int, ...] = (0,),
    block_mask: torch.Tensor | None = None,
) -> None:
    """Run and compare out and lse; padding holds NaN."""
    first = torch.tensor(starts, device=device)
    shape = (len(starts), num_kv_heads, kv_len)
    padding = (torch.arange(kv_len, device=device) < first.unsqueeze(1))[:, None, :, None]
    q = torch.randn(len(starts), q_len, num_kv_heads * d.group_size, d.head_dim).transpose(1, 2)
    k = torch.randn(*shape, d.head_dim).to(device).masked_fill(padding, torch.nan)
    v = torch.randn(*shape, d.value_dim or d.head_dim).to(device).masked_fill(padding, torch.nan)
    q, k, v = (x.to(d.dtype).to(device) for x in (q, k, v))
    options = {"softmax_scale": d.head_dim**-0.5, "starts": first, "block_mask": block_mask}
    with poisoned():
        out, lse = prefill_attention(d, q, k, v, **options)  # type: ignore[arg-type]
    expected, expected_lse = prefill_reference(d, q, k, v, q_start=kv_len - q_len, **options)  # type: ignore[arg-type]
    assert out.dtype == d.dtype
    assert_near(out, expected)
    assert_near(lse, expected_lse)


@each_device
@pytest.mark.parametrize("kv_len", [1, 7, 63, 65])
@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_odd_lengths_and_groups(kv_len: int, group_size: int, device: str) -> None:
    check(replace(PLAIN, group_size=group_size), min(kv_len, 20), kv_len, device)


@each_device
@pytest.mark.parametrize(
    "mask", ["full", "causal", "sliding_window", "chunked", "prefix", "local", "sinks_window"]
)
def test_masks_with_padding(mask: str, device: str) -> None:
    d = replace(PLAIN, mask=mask, span=18, num_sink_tokens=3, group_size=1)
    check(d, 52, 70, device, starts=(0, 19))


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, device: str) -> None:
    check(replace(PLAIN, dtype=dtype), 130, 150, device)


@each_device
def test_softcap_widths_and_heads(device: str) -> None:
    d = replace(PLAIN, softcap=0.5, head_dim=40, value_dim=24)
    check(d, 33, 40, device, num_kv_heads=2)


@settings(max_examples=8, deadline=None)
@given(
    q_len=st.integers(1, 50),
    earlier=st.integers(0, 40),
    padding=st.integers(0, 30),
    span=st.integers(1, 40),
    sinks=st.integers(0, 20),
    mask=st.sampled_from(["causal", "sliding_window", "chunked", "sinks_window"]),
)
def test_any_shape(
    q_len: int, earlier: int, padding: int, span: int, sinks: int, mask: str
) -> None:
    d = replace(PLAIN, mask=mask, span=span, num_sink_tokens=sinks, group_size=1)
    kv_len = q_len + earlier
    check(d, q_len, kv_len, starts=(min(padding, kv_len),))


@each_device
def test_rows_that_see_nothing(device: str) -> None:
    d = replace(PLAIN, form="block_mask")
    m, n = config_for(d).block_m, config_for(d).block_n
    block_mask = torch.tensor([[True, False], [False, False]], device=device)
    check(d, m + 1, n + 1, device, block_mask=block_mask)


@each_device
@pytest.mark.parametrize("mask", ["full", "causal", "sinks_window"])
def test_block_masks_of_each_head(mask: str, device: str) -> None:
    d = replace(PLAIN, mask=mask, span=40, num_sink_tokens=3, form="block_mask")
    block_mask = (torch.rand(1, 2, 2, 3) < 0.5).to(device)
    check(d, 60, 75, device, starts=(0, 3), block_mask=block_mask)


@each_device
def test_masked_tiles_are_not_computed(device: str) -> None:
    d = replace(PLAIN, mask="full", group_size=1, form="block_mask")
    m, n = config_for(d).block_m, config_for(d).block_n
    q, k = torch.randn(1, 1, 2 * m, 16, device=device), torch.randn(1, 1, 3 * n, 16, device=device)
    k[:, :, n : 2 * n] = torch.nan
    block_mask = torch.tensor([[True, False, True]] * 2, device=device)
    out, lse = prefill_attention(d, q, k, k, softmax_scale=1.0, block_mask=block_mask)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@each_device
@pytest.mark.parametrize("mask", ["causal", "sliding_window", "sinks_window", "chunked"])
def test_tiles_outside_of_the_structure_are_not_computed(mask: str, device: str) -> None:
    d = replace(PLAIN, mask=mask, span=32, num_sink_tokens=1, group_size=1)
    n = config_for(d).block_n
    q, k = torch.randn(1, 1, 4, 16, device=device), torch.randn(1, 1, 8 * n, 16, device=device)
    k[:, :, 6 * n :] = torch.nan  # after the queries
    if mask != "causal":
        k[:, :, n : 4 * n] = torch.nan  # between sinks and window
        k[:, :, :n] = k[:, :, :n] if mask == "sinks_window" else torch.nan
    out, _ = prefill_attention(d, q, k, k, softmax_scale=1.0, q_start=6 * n - 4)
    assert out.isfinite().all()


@each_device
def test_pointwise_work_on_the_result(device: str) -> None:
    gate = Operand("element_0", "element", torch.float32)
    steps = (Step("sigmoid", ("element_0",)), Step("mul", ("value", "t0")))
    epilogue = Epilogue(steps, (gate,), torch.bfloat16)
    q, k = torch.randn(2, 2, 17, 16, device=device), torch.randn(2, 1, 17, 16, device=device)
    operand = torch.randn(2, 2, 17, 16, device=device)
    plain, _ = prefill_attention(PLAIN, q, k, k, softmax_scale=0.25)
    with poisoned():
        out, _ = prefill_attention(
            replace(PLAIN, epilogue=epilogue), q, k, k, [operand], softmax_scale=0.25
        )
    expected = epilogue.reference(plain.flatten(0, 2), [operand])
    assert_near(out.flatten(0, 2), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(i - j < SPAN) |", "(i - j <= SPAN) |"),
        ("(j < NUM_SINK_TOKENS))", "(j <= NUM_SINK_TOKENS))"),
        ("acc = acc * shrink[:, None]", "acc = acc"),
        ("total * shrink + tl.sum(weights, 1)", "total + tl.sum(weights, 1)"),
        ("high = tl.minimum(last + 1, kv_len)", "high = tl.minimum(last, kv_len)"),
        ("first_sink + turn, low_tile", "first_sink + turn + 1, low_tile"),
        ("head // GROUP_SIZE * k_head", "head % GROUP_SIZE * k_head"),
        ("q_start + t - start", "q_start + t"),
        ("tl.log2(total)", "total"),
    ],
)
def test_mutations_are_noticed(old: str, new: str) -> None:
    d = replace(PLAIN, mask="sinks_window", span=20, num_sink_tokens=3)
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check(d, 40, 105, num_kv_heads=2, starts=(0, 5))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("acc = acc * shrink[:, None]", "acc = acc"),
        ("keep = keep & (j <= i)", "keep = keep & (j < i)"),
        (") * softmax_scale", ")"),
    ],
)
def test_mutations_are_noticed_in_sixteen_bits(old: str, new: str) -> None:
    d = replace(PLAIN, dtype=torch.bfloat16)
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check(d, 70, 130)


def test_mutated_lists_are_noticed() -> None:
    d = replace(PLAIN, mask="full", form="block_mask")
    block_mask = torch.tensor([[False, True, True], [True, False, True]], device=DEVICE)
    mutation = mutated("tl.cdiv(kv_len, BLOCK_N) + turn", "tl.cdiv(kv_len, BLOCK_N) + turn + 1")
    with mutation, pytest.raises(AssertionError, match="close"):
        check(d, 40, 96, block_mask=block_mask)


def test_what_does_not_fit_is_refused() -> None:
    q = torch.zeros(1, 2, 20, 16)
    k = torch.zeros(1, 1, 20, 16)
    with pytest.raises(InputError, match="go together"):
        prefill_attention(PLAIN, q, k, k, softmax_scale=1.0, block_mask=torch.ones(1, 1).bool())
    listed = replace(PLAIN, form="block_mask")
    with pytest.raises(InputError, match="shape"):
        prefill_attention(listed, q, k, k, softmax_scale=1.0, block_mask=torch.ones(1, 3).bool())
    assert "layout='paged'" in (PREFILL_ATTENTION.supports(replace(PLAIN, layout="paged")) or "")


def test_cost_of_a_causal_square_is_half() -> None:
    full = prefill_cost(replace(PLAIN, mask="full"), 1, 2, 1000, 1000).flops
    assert prefill_cost(PLAIN, 1, 2, 1000, 1000).flops == pytest.approx(full / 2, rel=2e-3)
