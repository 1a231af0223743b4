"""The streaming operators against the slow reference, step by step, in any chunking and padding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.dialect import OPS
from rewriter.errors import InputError
from tests.passes.slow_streaming import SlowStreaming

HEADS, KV_HEADS, DIM = 4, 2, 8
INV_FREQ = 1.0 / 50.0 ** (torch.arange(3).double() / 3)  # partial: 6 of 8 dimensions turn


class Ring:
    """State of one layer and the calls a derived program makes on it."""

    def __init__(
        self,
        batch_size: int,
        num_sink_tokens: int,
        recent_window: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.knobs = {"num_sink_tokens": num_sink_tokens, "recent_window": recent_window}
        slots = num_sink_tokens + recent_window + 1
        self.positions = torch.full((batch_size, slots), -1)
        self.keys = torch.zeros(batch_size, KV_HEADS, slots, DIM, dtype=dtype)
        self.values = torch.zeros(batch_size, KV_HEADS, slots, DIM, dtype=dtype)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, *, turn: bool, **extra: Any
    ) -> Tensor:
        slots, distance, mask, ranks = torch.ops.rewriter.streaming_entries(
            self.positions, q_positions, **self.knobs
        )
        angles = (ranks.unsqueeze(-1) * INV_FREQ).unsqueeze(1)
        tables = (angles.cos().to(q.dtype), angles.sin().to(q.dtype)) if turn else (None, None)
        sinks, slopes = extra.pop("sinks", None), extra.pop("slopes", None)
        extra["num_sink_tokens"] = self.knobs["num_sink_tokens"]
        return torch.ops.rewriter.streaming_attention(
            q, k, v, self.keys, self.values, slots, distance, mask, *tables, sinks, slopes,
            softmax_scale=0.5, **extra,
        )  # fmt: skip


def compare(
    num_sink_tokens: int,
    recent_window: int,
    chunks: list[int],
    pads: tuple[int, ...] = (0, 0),
    *,
    turn: bool = True,
    dtype: torch.dtype = torch.float32,
    **extra: Any,
) -> float:
    """Largest difference from the slow reference over every row and token; pads are on the left."""
    torch.manual_seed(0)
    batch_size, length = len(pads), sum(chunks)
    q, k, v = (
        torch.randn(batch_size, n, length, DIM).to(dtype) for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    positions = (torch.arange(length) - torch.tensor(pads).unsqueeze(1)).clamp_min(-1)
    ring = Ring(batch_size, num_sink_tokens, recent_window, dtype)
    start, found = 0, []
    for size in chunks:
        part = slice(start, start + size)
        new = (x[:, :, part] for x in (q, k, v))
        found.append(ring(*new, positions[:, part].contiguous(), turn=turn, **extra))
        start += size
    outputs, worst = torch.cat(found, dim=2), 0.0
    for row, pad in enumerate(pads):
        assert not outputs[row, :, :pad].any()
        slow = SlowStreaming(
            num_sink_tokens, recent_window, INV_FREQ if turn else None, 0.5, **extra
        )
        for at in range(pad, length):
            expected = slow.step(q[row, :, at], k[row, :, at], v[row, :, at])
            worst = max(worst, float((outputs[row, :, at] - expected).abs().max()))
    return worst


@pytest.mark.parametrize("knobs", [(4, 7), (1, 8), (0, 5), (2, 1), (4, 60)])
def test_one_token_at_a_time(knobs: tuple[int, int]) -> None:
    assert compare(*knobs, [1] * 30) < 2e-6


@pytest.mark.parametrize(
    ("size", "knobs"), list(itertools.product([3, 7, 12], [(4, 12), (0, 12), (2, 30)]))
)
def test_chunks(size: int, knobs: tuple[int, int]) -> None:
    assert compare(*knobs, [size] * 3 + [1] * 4 + [size] * 2) < 2e-6


@pytest.mark.parametrize("chunks", [[9, 1, 1, 9, 9, 1], [1] * 20, [12, 12, 12], [5, 1, 12, 1, 1]])
def test_left_padding(chunks: list[int]) -> None:
    assert compare(3, 12, chunks, (0, 2, 7)) < 2e-6


def test_a_chunk_of_nothing_but_padding() -> None:
    assert compare(3, 6, [5, 5, 1, 1, 6], (0, 8)) < 2e-6


@pytest.mark.parametrize(
    "extra",
    [
        {"softcap": 1.5},
        {"sinks": torch.tensor([0.1, -1.0, 2.0, 0.5])},
        {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.05]), "turn": False},
        {"span": 6},
        {"span": 14},
        {"turn": False},
        {"sinks": torch.rand(4), "softcap": 2.0, "span": 9},
    ],
)
@pytest.mark.parametrize("chunks", [[1] * 24, [9, 1, 1, 9, 4]])
def test_what_models_add(chunks: list[int], extra: dict[str, Any]) -> None:
    assert compare(3, 9, chunks, (0, 4), **extra) < 2e-6


def test_interleaved_pairs() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 20, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
    ring, slow = Ring(1, 2, 5), SlowStreaming(2, 5, INV_FREQ, 0.5, interleaved=True)
    for at in range(20):
        new = (x[:, :, at : at + 1] for x in (q, k, v))
        found = ring(*new, torch.tensor([[at]]), turn=True, interleaved=True)
        expected = slow.step(q[0, :, at], k[0, :, at], v[0, :, at])
        torch.testing.assert_close(found[0, :, 0].double(), expected, atol=2e-6, rtol=0)


def test_budget_of_the_length_is_dense() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 20, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
    positions = torch.arange(20).expand(2, 20).contiguous()
    angles = positions[:, None, :, None] * INV_FREQ
    cos, sin = angles.cos().float(), angles.sin().float()
    turned = [OPS["rope"].reference(x, cos, sin, interleaved=False) for x in (q, k)]
    dense = OPS["attention"].reference(*turned, v, softmax_scale=0.5, mask="causal")
    found = Ring(2, 3, 20)(q, k, v, positions, turn=True)
    torch.testing.assert_close(found, dense, atol=2e-6, rtol=0)


@pytest.mark.parametrize("chunks", [[1] * 20, [8, 1, 8, 8]])
def test_bfloat16(chunks: list[int]) -> None:
    assert compare(3, 8, chunks, dtype=torch.bfloat16) < 4e-2


def test_more_than_the_window_at_once_raises() -> None:
    with pytest.raises(InputError, match="9 new tokens"):
        compare(2, 8, [9])


def test_traces() -> None:
    for q_len in (1, 5):
        positions = torch.arange(q_len).expand(2, q_len).contiguous()
        torch.library.opcheck(
            torch.ops.rewriter.streaming_entries.default,
            (torch.full((2, 13), -1), positions),
            {"num_sink_tokens": 4, "recent_window": 8},
            test_utils=("test_schema", "test_faketensor"),
        )
