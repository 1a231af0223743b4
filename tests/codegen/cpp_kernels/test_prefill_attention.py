"""Prefill by tiles of the fused kernel against the plain meaning of every mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen.cpp_kernels import prefill_attention as module
from codegen.cpp_kernels.decode_attention import reference
from codegen.cpp_kernels.prefill_attention import cost, prefill_attention, supports
from codegen.kernel import KernelDescription
from rewriter.dialect.attention import MASKS
from rewriter.errors import ConfigError, InputError
from tests.codegen.cpp_kernels.running import poisoned
from tests.codegen.tolerances import assert_near

pytestmark = pytest.mark.usefixtures("poisoned")
__all__ = ["poisoned"]


def describe(**changes: Any) -> KernelDescription:
    told = {"operator": "prefill_attention", "head_dim": 16, "mask": "causal"}
    return KernelDescription(**{**told, **changes})


def make(
    heads: tuple[int, int], q_len: int, kv_len: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kv_len)
    shapes = ((heads[0], q_len), (heads[1], kv_len), (heads[1], kv_len))
    q, k, v = (torch.randn(2, *s, 16, generator=generator).to(dtype) for s in shapes)
    return q, k, v


def check(
    d: KernelDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tile: int,
    block_mask: Tensor | None = None,
) -> None:
    out, lse = prefill_attention(d, q, k, v, softmax_scale=0.3, tile=tile, block_mask=block_mask)
    bias = None
    if block_mask is not None:
        cells = block_mask.repeat_interleave(tile, 1).repeat_interleave(tile, 2)
        bias = cells[:, : q.shape[2], : k.shape[2]]
    expected, expected_lse = reference(
        *(q, k, v, None, None, bias),
        softmax_scale=0.3,
        mask=d.mask,
        span=d.span,
        num_sink_tokens=d.num_sink_tokens,
    )
    assert_near(out, expected)
    assert_near(lse, expected_lse, q.dtype)


@settings(deadline=None, max_examples=80)
@given(
    group_size=st.sampled_from([1, 4]),
    kv_len=st.integers(1, 150),
    part=st.floats(0.01, 1),
    mask=st.sampled_from((*MASKS, "sinks_window")),
    span=st.integers(1, 150),
    tile=st.sampled_from([1, 16, 50]),
)
def test_masks(group_size: int, kv_len: int, part: float, mask: str, span: int, tile: int) -> None:
    q, k, v = make((2 * group_size, 2), math.ceil(part * kv_len), kv_len)
    check(describe(mask=mask, span=span, num_sink_tokens=span % 5), q, k, v, tile=tile)


@settings(deadline=None, max_examples=40)
@given(
    q_len=st.integers(1, 100),
    more=st.integers(0, 50),
    by_head=st.booleans(),
    mask=st.sampled_from(("full", "causal", "sliding_window")),
    seed=st.integers(0, 99),
)
def test_block_masks(q_len: int, more: int, by_head: bool, mask: str, seed: int) -> None:
    """Also rows of tiles that are all off: zeros, and -inf."""
    q, k, v = make((4, 2), q_len, q_len + more)
    generator = torch.Generator().manual_seed(seed)
    shape = (4 if by_head else 1, -(-q_len // 16), -(-(q_len + more) // 16))
    blocks = torch.rand(*shape, generator=generator) < 0.5
    check(describe(mask=mask, span=40), q, k, v, tile=16, block_mask=blocks)


def test_bfloat16() -> None:
    q, k, v = make((4, 2), 100, 100, torch.bfloat16)
    check(describe(dtype=torch.bfloat16, mask="sliding_window", span=30), q, k, v, tile=16)


def test_only_visible_entries_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[int] = []
    fused = module._fused

    def counting(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        touched.append(q.shape[2] * k.shape[2])
        return fused(q, k, v, *rest, **options)

    monkeypatch.setattr(module, "_fused", counting)
    q, k, v = make((2, 2), 512, 512)
    d = describe(mask="sinks_window", span=64, num_sink_tokens=4)
    prefill_attention(d, q, k, v, softmax_scale=0.3, tile=32)
    assert sum(touched) <= 512 * (64 + 32 + 4)
    assert cost(d, q, k, v, tile=32).flops == 4.0 * 2 * 2 * 16 * sum(touched)


def test_refusals() -> None:
    q, k, v = make((4, 2), 40, 40)
    with pytest.raises(ConfigError, match="softcap"):
        prefill_attention(describe(softcap=1.0), q, k, v, softmax_scale=0.3)
    with pytest.raises(InputError, match="block_mask="):
        blocks = torch.ones(1, 2, 2, dtype=torch.bool)
        prefill_attention(describe(), q, k, v, softmax_scale=0.3, tile=16, block_mask=blocks)
    assert "value_dim" in str(supports(describe(value_dim=8)))
    assert "layout" in str(supports(describe(layout="paged")))


@pytest.mark.parametrize("wrong", ["lse of blind rows", "edges", "merge"])
def test_mistakes_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make((4, 2), 100, 100)
    d = describe(mask="sliding_window", span=40)
    check(d, q, k, v, tile=16)
    fused = module._fused
    if wrong == "lse of blind rows":  # 0, as PyTorch's kernel has it

        def trusting(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
            out, lse = fused(*tensors, **options)
            return out, lse.nan_to_num(neginf=0.0)

        monkeypatch.setattr(module, "_fused", trusting)
    elif wrong == "edges":
        columns = module._columns
        monkeypatch.setattr(
            module, "_columns", lambda *a: (sum(columns(*a)) > 0, columns(*a)[1] & False)
        )
    else:
        monkeypatch.setattr(torch, "logaddexp", lambda a, _: a)
    with pytest.raises(AssertionError):
        check(d, q, k, v, tile=16)
