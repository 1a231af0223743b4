"""Bias, ALiBi slopes and sinks in both attention kernels, against the dialect's operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen.cpp_kernels.decode_attention import reference
from codegen.kernel import KernelDescription
from codegen.triton_kernels.decode_attention import DECODE_ATTENTION, decode_attention
from codegen.triton_kernels.prefill_attention import PREFILL_ATTENTION, prefill_attention
from codegen.triton_kernels.score_terms import TERMS
from rewriter.errors import InputError
from tests.codegen.tolerances import assert_near
from tests.codegen.triton_kernels.attention_cases import DEVICE, mutated, poisoned

PLAIN = KernelDescription(
    operator="decode_attention", head_dim=16, group_size=2, mask="causal", softcap=3.0
)
BATCH, HEADS, Q_LEN, KV_LEN = 2, 4, 3, 70
ALL = [
    ("bias",),
    ("seen",),
    ("sinks",),
    ("slopes",),
    ("bias", "sinks", "slopes"),
    ("seen", "sinks"),
]


def terms(names: tuple[str, ...], q_len: int = Q_LEN) -> dict[str, Tensor]:
    """A bias of each request and query that all heads share; slopes and sinks of each head."""
    made: dict[str, Tensor] = {
        "bias": torch.randn(BATCH, 1, q_len, KV_LEN),
        "seen": torch.rand(1, HEADS, 1, KV_LEN) < 0.6,
        "sinks": torch.randn(HEADS) + 1,
        "slopes": -0.1 * torch.rand(HEADS),
    }
    chosen = {name: made[name].to(DEVICE) for name in names}
    if "seen" in chosen:
        chosen["bias"] = chosen.pop("seen")
    return chosen


def decoded(names: tuple[str, ...], **changes: Any) -> None:
    """Out and lse of three new tokens in two splits, the first request being padded."""
    d = replace(PLAIN, terms=names, **changes)
    q = torch.randn(BATCH, HEADS, Q_LEN, 16, device=DEVICE).to(d.dtype)
    k, v = torch.randn(2, BATCH, 2, KV_LEN, 16, device=DEVICE).to(d.dtype)
    positions = torch.tensor([[-1, 40, 41], [67, 68, 69]], device=DEVICE)
    told = {"softmax_scale": 0.3, **terms(names)}
    with poisoned():
        out, lse = decode_attention(d, q, k, v, positions, num_splits=2, **told)
    options = {"mask": d.mask, "span": d.span, "softcap": d.softcap}
    expected, expected_lse = reference(q, k, v, positions, **told, **options)
    assert_near(out, expected)
    assert_near(lse, expected_lse)


def filled(names: tuple[str, ...], **changes: Any) -> None:
    """Out and lse of a prompt of 40 behind 30 entries."""
    d = replace(PLAIN, operator="prefill_attention", terms=names, **changes)
    q = torch.randn(BATCH, HEADS, 40, 16, device=DEVICE).to(d.dtype)
    k, v = torch.randn(2, BATCH, 2, KV_LEN, 16, device=DEVICE).to(d.dtype)
    told = {"softmax_scale": 0.3, **terms(names, 40)}
    with poisoned():
        out, lse = prefill_attention(d, q, k, v, **told)
    options = {"mask": d.mask, "span": d.span, "softcap": d.softcap}
    expected, expected_lse = reference(q, k, v, **told, **options)
    assert_near(out, expected)
    assert_near(lse, expected_lse)


@pytest.mark.parametrize("names", ALL, ids=",".join)
def test_terms_of_new_tokens(names: tuple[str, ...]) -> None:
    decoded(names)


@pytest.mark.parametrize("names", ALL, ids=",".join)
def test_terms_of_prompts(names: tuple[str, ...]) -> None:
    filled(names)


def test_terms_with_windows_and_half_precision() -> None:
    told = {"mask": "sliding_window", "span": 20, "dtype": torch.bfloat16}
    decoded(("bias", "sinks", "slopes"), **told)
    filled(("bias", "sinks", "slopes"), **told)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("bias", "scores += tl.load(bias,", "scores -= tl.load(bias,"),
        ("seen", "!= 0, scores, ", "== 0, scores, "),
        ("slopes", "scores += slope * distance", "scores -= slope * distance"),
        ("sinks", "total * shrink + tl.exp2(sink - base)", "total * shrink"),
    ],
)
@pytest.mark.parametrize("check", [decoded, filled])
def test_mutations_are_noticed(name: str, old: str, new: str, check: Any) -> None:
    with mutated(old, new), pytest.raises(AssertionError, match="close"):
        check((name,))


def test_a_sink_counts_once_in_all_splits() -> None:
    everywhere = mutated("tl.where(split == 0, sink,", "tl.where(split >= 0, sink,")
    with everywhere, pytest.raises(AssertionError, match="close"):
        decoded(("sinks",))


def test_other_terms_are_refused() -> None:
    for kernel in (DECODE_ATTENTION, PREFILL_ATTENTION):
        for wrong in (("slopes", "sinks"), ("bias", "seen"), ("rotary",)):
            assert "allowed: bias then seen" in (kernel.supports(replace(PLAIN, terms=wrong)) or "")
        assert kernel.supports(replace(PLAIN, terms=TERMS[1:])) is None
    q, k = torch.randn(1, 2, 1, 16, device=DEVICE), torch.randn(1, 1, 4, 16, device=DEVICE)
    with pytest.raises(InputError, match="as described"):
        decode_attention(PLAIN, q, k, k, softmax_scale=1.0, sinks=torch.zeros(2))
    sunk = replace(PLAIN, terms=("sinks",))
    with pytest.raises(InputError, match=r"sinks: shape \(3,\)"):
        decode_attention(sunk, q, k, k, softmax_scale=1.0, sinks=torch.zeros(3))
    biased = replace(PLAIN, terms=("bias",))
    with pytest.raises(InputError, match="what broadcasts to"):
        decode_attention(biased, q, k, k, softmax_scale=1.0, bias=torch.zeros(5))
