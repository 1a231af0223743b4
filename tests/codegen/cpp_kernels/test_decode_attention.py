"""The C++ decode attention against its plain meaning and the operators it can stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import codegen.cpp_kernels.decode_attention as kernel
from codegen.cpp_kernels.decode_attention import DecodeAttention, decode_attention, reference
from codegen.kernel import KernelDescription
from rewriter.dialect.attention import MASKS, attention
from rewriter.dialect.streaming import streaming_attention, streaming_entries
from rewriter.errors import InputError
from tests.codegen.cpp_kernels.running import RUNNABLE, mutate, needs_compiler, poisoned
from tests.codegen.tolerances import assert_near

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned")]
__all__ = ["poisoned"]

_DTYPES = (torch.float32, torch.bfloat16)


def describe(**changes: Any) -> KernelDescription:
    told = {"operator": "decode_attention", "head_dim": 20, "value_dim": 20, "mask": "causal"}
    return KernelDescription(**{**told, **changes})


def make(
    batch_size: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    q_len: int = 1,
    kv_len: int = 70,
    head_dim: int = 20,
    value_dim: int = 20,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return (
        normal(batch_size, num_heads, q_len, head_dim),
        normal(batch_size, num_kv_heads, kv_len, head_dim),
        normal(batch_size, num_kv_heads, kv_len, value_dim),
    )


def check(
    description: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None = None,
    *,
    threads: int = 2,
    isa: str = "native",
    **given: Any,
) -> None:
    out, lse = decode_attention(
        description, q, k, v, q_positions, softmax_scale=0.3, threads=threads, isa=isa, **given
    )
    expected, expected_lse = reference(
        q,
        k,
        v,
        q_positions,
        softmax_scale=0.3,
        mask=description.mask,
        span=description.span,
        softcap=description.softcap,
        num_sink_tokens=description.num_sink_tokens,
        **given,
    )
    assert out.dtype == q.dtype
    assert_near(out, expected)
    assert_near(lse, expected_lse)


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("dtype", _DTYPES)
def test_instruction_sets(isa: str, dtype: torch.dtype) -> None:
    for group_size in (1, 4, 7):
        for kv_len in (1, 7, 63, 64, 65, 300):
            for threads in (1, 2, 3):
                q, k, v = make(1, 3 * group_size, 3, 1, kv_len, dtype=dtype, seed=kv_len)
                check(describe(dtype=dtype), q, k, v, threads=threads, isa=isa)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 128), (80, 36), (1, 3)])
def test_widths(head_dim: int, value_dim: int) -> None:
    d = describe(head_dim=head_dim, value_dim=value_dim)
    for num_heads, num_kv_heads in ((8, 8), (8, 1), (6, 2)):
        q, k, v = make(2, num_heads, num_kv_heads, 2, 130, head_dim, value_dim)
        check(d, q, k, v, threads=3)


def test_entries_narrower_than_queries() -> None:
    q, k, v = make()
    d = describe(weight_dtype=torch.bfloat16)
    check(d, q, k.bfloat16(), v.bfloat16())


@settings(deadline=None, max_examples=60)
@given(
    batch_size=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    group_size=st.sampled_from([1, 2, 3, 4, 8]),
    q_len=st.integers(1, 5),
    kv_len=st.integers(1, 200),
    threads=st.integers(1, 5),
    mask=st.sampled_from((*MASKS, "sinks_window")),
    span=st.integers(1, 150),
    softcap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_masks(
    batch_size: int,
    num_kv_heads: int,
    group_size: int,
    q_len: int,
    kv_len: int,
    threads: int,
    mask: str,
    span: int,
    softcap: float,
    seed: int,
) -> None:
    q_len = min(q_len, kv_len)
    heads = (num_kv_heads * group_size, num_kv_heads)
    q, k, v = make(batch_size, *heads, q_len, kv_len, seed=seed)
    d = describe(mask=mask, span=span, softcap=softcap, num_sink_tokens=span % 7)
    check(d, q, k, v, threads=threads)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), mask=st.sampled_from((*MASKS, "sinks_window")), q_len=st.integers(1, 3))
def test_slots_and_terms(data: st.DataObject, mask: str, q_len: int) -> None:
    """Entries in any order, empty ones, padding, bias, ALiBi and sinks, in all combinations."""
    kv_len = data.draw(st.integers(1, 90))
    q, k, v = make(2, 6, 3, q_len, kv_len)
    generator = torch.Generator().manual_seed(kv_len)
    k_positions = torch.stack([torch.randperm(kv_len, generator=generator) for _ in range(2)])
    k_positions[0, : data.draw(st.integers(0, kv_len))] = -1
    q_positions = torch.full((2, q_len), kv_len - 1) - torch.arange(q_len)
    q_positions[1, 0] = data.draw(st.sampled_from([-1, 0, kv_len // 2]))
    given: dict[str, Tensor] = {}
    if data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([(1, 1, 1, 1), (2, 1, q_len, 1), (2, 6, q_len, kv_len)]))
        bias = torch.randn(*shape, generator=generator)
        given["bias"] = bias > -1.0 if data.draw(st.booleans()) else bias
    for name in ("sinks", "slopes"):
        if data.draw(st.booleans()):
            given[name] = torch.randn(6, generator=generator) / 8  # scores of 100 round to 1e-5
    d = describe(mask=mask, span=17, num_sink_tokens=3, layout="slots")
    check(d, q, k, v, q_positions, k_positions=k_positions, **given)


def test_positions_may_differ_by_head() -> None:
    q, k, v = make(1, 4, 2, 1, 80)
    k_positions = torch.stack((torch.arange(80), torch.arange(80).flip(0))).unsqueeze(0)
    at = torch.tensor([[40]])
    d = describe(layout="slots")
    out, _ = decode_attention(d, q, k, v, at, k_positions=k_positions, softmax_scale=0.3)
    for head in range(2):
        own = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        mine, _ = reference(
            *(q[:, own[0]], k[:, own[1]], v[:, own[1]], at, k_positions[:, head]),
            softmax_scale=0.3,
            mask="causal",
        )
        assert_near(out[:, own[0]], mine)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nothing_visible(threads: int) -> None:
    """Zeros and -inf; a sink alone gives zeros and its own logit."""
    q, k, v = make(2, 4, 2, 2, 130)
    nowhere = torch.full((2, 2), -1)
    out, lse = decode_attention(describe(), q, k, v, nowhere, softmax_scale=0.3, threads=threads)
    assert (out == 0).all() and (lse == -math.inf).all()
    sinks = torch.arange(4.0)
    out, lse = decode_attention(
        describe(), q, k, v, nowhere, softmax_scale=0.3, sinks=sinks, threads=threads
    )
    assert (out == 0).all()
    assert_near(lse, sinks.view(1, 4, 1).expand(2, 4, 2))
    out, lse = decode_attention(
        *(describe(), q, k[:, :, :0], v[:, :, :0]), softmax_scale=0.3, threads=threads
    )
    assert (out == 0).all() and (lse == -math.inf).all()


def test_entries_in_use_and_pages() -> None:
    """Rows of a batch end at different entries, in pages in any order and of any size."""
    generator = torch.Generator().manual_seed(0)
    for page_size in (1, 16, 24):
        q, k, v = make(3, 4, 2, 1, 96)
        kv_lens = torch.tensor([96, 5, 50])
        at = (kv_lens - 1).unsqueeze(1)
        d = describe(layout="paged", page_size=page_size)
        table = torch.randperm(3 * 96 // page_size, generator=generator).view(3, -1)

        def pages(x: Tensor, page_size: int = page_size, table: Tensor = table) -> Tensor:
            rows = x.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1)
            return torch.empty_like(rows).index_copy(0, table.flatten(), rows).contiguous()

        out, lse = decode_attention(
            *(d, q, pages(k), pages(v), at), softmax_scale=0.3, kv_lens=kv_lens, block_table=table
        )
        expected, expected_lse = reference(q, k, v, at, softmax_scale=0.3, mask="causal")
        assert_near(out, expected)
        assert_near(lse, expected_lse)


def test_chosen_entries() -> None:
    q, k, v = make(2, 4, 2, 1, 200)
    index = torch.stack([torch.randperm(200)[:77] for _ in range(4)]).view(2, 2, 77)
    d = describe(form="chosen", mask="full")
    out, _ = decode_attention(d, q, k, v, softmax_scale=0.3, index=index)
    at = index.unsqueeze(3).expand(-1, -1, -1, 20)
    expected, _ = reference(q, k.gather(2, at), v.gather(2, at), softmax_scale=0.3, mask="full")
    assert_near(out, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("steps", [3, 40])
def test_serves_streaming_attention(interleaved: bool, steps: int) -> None:
    """One new token over sinks and a ring whose keys turn as they are read."""
    sinks, window, batch_size = 2, 30, 2
    slot_positions = torch.full((batch_size, sinks + window + 1), -1)
    _, k_ring, v_ring = make(batch_size, 4, 2, 1, sinks + window + 1)
    angles = torch.rand(batch_size, 1, sinks + window + 2, 8)
    cos, sin = angles.cos(), angles.sin()
    for step in range(steps):
        q_positions = torch.tensor([[step], [step - 1]])
        slots, distance, mask, _ = streaming_entries.reference(
            slot_positions, q_positions, num_sink_tokens=sinks, recent_window=window
        )
    q, k, v = make(batch_size, 4, 2, 1, 1, seed=5)
    slopes = torch.rand(4)
    expected = streaming_attention.reference(
        *(q, k, v, k_ring, v_ring, slots, distance, mask, cos, sin, None, slopes),
        softmax_scale=0.3,
        num_sink_tokens=sinks,
        interleaved=interleaved,
        span=20,
    )
    entries = sinks + window
    plain = rotated(q, cos[:, :, entries], sin[:, :, entries], interleaved)
    d = describe(form="rotary", mask="sliding_window", span=20)
    out, _ = decode_attention(
        *(d, plain, k_ring[:, :, :-1], v_ring[:, :, :-1]),
        softmax_scale=0.3,
        bias=mask,
        slopes=slopes,
        distance=distance,
        rotary=(cos[:, 0, :entries], sin[:, 0, :entries]),
        interleaved=interleaved,
    )
    real = q_positions.squeeze(1) >= 0
    assert_near(out[real], expected[real])


def rotated(q: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = q[..., :width]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((out, q[..., width:]), -1)


def test_serves_attention() -> None:
    """The dialect's own operator, with strided caches as views of a larger one."""
    q, k, v = make(2, 8, 2, 1, 300)
    k, v = k[:, :, 40:240], v[:, :, 40:240]
    for mask, span in (("causal", 0), ("sliding_window", 70), ("chunked", 64)):
        expected = attention.reference(q, k, v, softmax_scale=0.3, mask=mask, span=span)
        out, _ = decode_attention(describe(mask=mask, span=span), q, k, v, softmax_scale=0.3)
        assert_near(out, expected)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"q": torch.zeros(2, 4, 1, 19)}, "q="),
        ({"v": torch.zeros(2, 2, 69, 20)}, "v="),
        ({"k": torch.zeros(2, 2, 70, 20, dtype=torch.float16)}, "k="),
        ({"q": torch.zeros(2, 3, 1, 20)}, "k="),
        ({"q_positions": torch.zeros(2, 1)}, "q_positions="),
        ({"kv_lens": torch.tensor([1, 2])}, "kv_lens"),
        ({"kv_lens": torch.tensor([1, 71]), "q_positions": torch.zeros(2, 1).long()}, "kv_lens"),
        ({"bias": torch.zeros(3, 1, 1, 70)}, "bias="),
        ({"sinks": torch.zeros(5)}, "sinks="),
        ({"index": torch.zeros(2, 1, 4).long()}, "index"),
    ],
)
def test_wrong_inputs(changes: dict[str, Tensor], told: str) -> None:
    q, k, v = make()
    given: dict[str, Any] = {"q": q, "k": k, "v": v, **changes}
    with pytest.raises(InputError, match=told):
        decode_attention(describe(), softmax_scale=0.3, **given)


def test_supports() -> None:
    refused = DecodeAttention().supports(describe(dtype=torch.float16))
    assert refused == "dtype=float16: float32 or bfloat16"
    assert DecodeAttention().supports(describe(mask="sinks_window", layout="paged")) is None
    assert "form" in str(DecodeAttention().supports(describe(form="x")))


MUTATIONS = (
    ("float shift = highest == -INFINITY ? 0.0f : highest;", "float shift = highest;"),
    ("keep = exp_(peak - shift);", "keep = 1.0f;"),
    ("total = total * keep + added;", "total = total + added;"),
    ("splat(weights[r * KV_BLOCK + e])", "splat(weights[e])"),
    ("* splat(scale));", ");"),
    ("scores[i] = -INFINITY;", "scores[i] = 0;"),
    ("j <= i && i - j < w;", "j <= i && i - j <= w;"),
    ("j < sinks", "j <= sinks"),
    ("if (any) weigh_block", "if (!any) weigh_block"),
    ("part.total[r] * a + more.total[r] * b", "part.total[r] + more.total[r]"),
    ("more.sums[r * DV + c] * b", "more.sums[r * DV + c]"),
    ("if (slot == 0) ", "if (false) "),
    ("head = kv_head * group_size + row / q_len", "head = kv_head + row / q_len"),
    ("visible(j[e]) && j[e] >= 0", "visible(j[e])"),
    ("exp_(sink - highest)", "exp_(sink)"),
    ("tanh_(s[e] / softcap)", "(s[e] / softcap)"),
)
"""Each must make the comparison below fail: text that is there, and what takes its place."""


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_mutations_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make(1, 6, 3, 2, 200)
    k_positions = torch.arange(200).flip(0).unsqueeze(0)
    k_positions[0, 3:40] = -1
    sinks, slopes = torch.linspace(-1, 1, 6), torch.linspace(0, 0.1, 6)
    at = torch.tensor([[199, 150]])
    given = {"k_positions": k_positions, "sinks": sinks, "slopes": slopes}

    def compare() -> None:
        for mask in ("sliding_window", "sinks_window"):
            d = describe(mask=mask, span=90, num_sink_tokens=9, softcap=3.0, layout="slots")
            check(d, q, k, v, at, threads=2, **given)
        nothing, lse = decode_attention(
            describe(), q, k, v, torch.full((1, 2), -1), softmax_scale=0.3
        )
        assert (nothing == 0).all() and (lse == -math.inf).all()
        check(describe(mask="full"), q[:, :, :1], k, v, threads=2)

    compare()
    mutate(monkeypatch, kernel, old, new)
    with pytest.raises(AssertionError):
        compare()
    kernel._entry.cache_clear()
