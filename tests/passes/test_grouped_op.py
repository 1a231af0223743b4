"""`rewriter::grouped_attention` equals `rewriter::attention` on everything that operator takes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.dialect import OPS
from rewriter.dialect.attention import MASKS

SHAPES = [(1, 1), (1, 9), (1, 40), (5, 5), (4, 9), (24, 24), (20, 45)]
HEADS = [(4, 2), (6, 1), (8, 2)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def operands(
    heads: tuple[int, int], q_len: int, kv_len: int, dtype: torch.dtype, batch_size: int = 2
) -> list[Tensor]:
    num_heads, num_kv_heads = heads
    dims = [(num_heads, q_len, 16), (num_kv_heads, kv_len, 16), (num_kv_heads, kv_len, 12)]
    return [torch.randn(batch_size, *d).to(dtype) for d in dims]


def assert_same(tensors: list[Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    options = {"softmax_scale": 0.3, "mask": "causal", **options}
    expected = OPS["attention"].reference(*tensors, **options)
    found = torch.ops.rewriter.grouped_attention(*tensors, **options)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= TOLERANCE[dtype]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_mask_without_positions(mask: str, shape: tuple[int, int]) -> None:
    for heads, span, dtype in itertools.product(HEADS, (1, 4, 7, 64), TOLERANCE):
        assert_same(operands(heads, *shape, dtype), dtype, mask=mask, span=span)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_mask_with_padding(mask: str, shape: tuple[int, int]) -> None:
    q_len, kv_len = shape
    k_positions = torch.stack([torch.arange(kv_len), torch.arange(kv_len) - 3]).clamp_min(-1)
    q_positions = k_positions[:, kv_len - q_len :].contiguous()
    for heads, span in itertools.product(HEADS, (1, 4, 64)):
        tensors = [*operands(heads, *shape, torch.float32), q_positions, k_positions]
        if bool((q_positions >= 0).any()):
            assert_same(tensors, mask=mask, span=span)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_addition(mask: str, shape: tuple[int, int]) -> None:
    q_len, kv_len = shape
    for heads, dtype in itertools.product(HEADS, TOLERANCE):
        per_head = torch.rand(heads[0])
        full = torch.randn(2, heads[0], q_len, kv_len)
        shared = torch.randn(2, 1, 1, kv_len)
        keep = torch.rand(1, 1, q_len, kv_len) > 0.3
        keep[..., -1] = True
        for extra in (
            {"softcap": 2.0},
            {"sinks": per_head.to(dtype)},
            {"slopes": per_head},
            {"bias": full},
            {"bias": full.to(dtype)},
            {"bias": shared.to(dtype)},
            {"bias": keep},
            {"bias": full[0, 0]},
            {"bias": shared, "sinks": per_head, "slopes": per_head, "softcap": 3.0},
        ):
            tensors = operands(heads, *shape, dtype)
            assert_same(tensors, dtype, mask=mask, span=6, **extra)


def test_reads_no_more_than_the_window() -> None:
    q, k, v = operands((4, 2), 1, 40, torch.float32)
    k[:, :, :36], v[:, :, :36] = float("nan"), float("nan")
    found = torch.ops.rewriter.grouped_attention(
        q, k, v, softmax_scale=1.0, mask="sliding_window", span=4
    )
    assert found.isfinite().all()


def test_traces() -> None:
    tensors = tuple(operands((4, 2), 3, 9, torch.float32))
    torch.library.opcheck(
        torch.ops.rewriter.grouped_attention.default,
        tensors,
        {"softmax_scale": 1.0, "mask": "causal"},
        test_utils=("test_schema", "test_faketensor"),
    )
