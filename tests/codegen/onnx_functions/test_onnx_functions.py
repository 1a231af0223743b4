"""The functions that write a state anew, against the references that mutate it."""

import torch

from codegen.onnx_functions.positions import by_mask, last_row, right_padded, rows_by_mask
from codegen.onnx_functions.random_entries import random_entries
from codegen.onnx_functions.state import attend_ring, streaming_entries
from rewriter.dialect import OPS

SINKS, WINDOW = 2, 5
BUDGET = SINKS + WINDOW


def positions(chunk, start):
    row = torch.arange(start, start + chunk)
    return torch.stack((row, row))


def assert_rings(entries, reference, knobs, chunks):
    """Fed the same chunks, both attend alike and keep the same positions."""
    generator = torch.Generator().manual_seed(1)
    made = torch.full((2, BUDGET + 1), -1)
    mutated = made.clone()
    rings = [torch.zeros(2, 2, BUDGET + 1, 4) for _ in range(2)]
    expected_rings = [ring.clone() for ring in rings]
    start = 0
    for chunk in chunks:
        q = torch.randn(2, 4, chunk, 4, generator=generator)
        k, v = (torch.randn(2, 2, chunk, 4, generator=generator) for _ in range(2))
        at = positions(chunk, start)
        slots, distance, mask, *_, made = entries(made, at, **knobs)
        options = {"softmax_scale": 0.5, "num_sink_tokens": 0, "span": 4}
        out, *rings = attend_ring(q, k, v, *rings, slots, distance, mask, **options)
        slots, distance, mask, *_ = reference(mutated, at, **knobs)
        given = (q, k, v, *expected_rings, slots, distance, mask)
        expected = OPS["streaming_attention"].reference(*given, **options)
        torch.testing.assert_close(out, expected)
        assert torch.equal(made[:, :-1].sort(1).values, mutated[:, :-1].sort(1).values)
        start += chunk


def test_streaming_entries_without_mutation():
    knobs = {"num_sink_tokens": SINKS, "recent_window": WINDOW}
    reference = OPS["streaming_entries"].reference
    assert_rings(streaming_entries, reference, knobs, (3, 1, 5, 1, 1, 4))


def test_random_entries_without_mutation():
    knobs = {"num_random": SINKS, "recent_window": WINDOW, "seed": 3}
    assert_rings(random_entries, OPS["random_entries"].reference, knobs, (3, 1, 5, 1, 1, 4))


def test_positions_of_either_padding():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    position_ids, q_positions, k_positions = by_mask(mask, ids)
    assert position_ids.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert q_positions.tolist() == k_positions.tolist() == [[-1, 0, 1], [0, 1, -1]]
    assert rows_by_mask(q_positions).tolist() == [2, 1]
    hidden = torch.arange(6.0).view(2, 3, 1)
    assert last_row(hidden, rows_by_mask(q_positions)).flatten().tolist() == [2.0, 4.0]


def test_rows_count_on_behind_right_padding():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1]])
    first = right_padded(mask[:, :3], torch.zeros(2, 3, dtype=torch.int64))[0]
    assert first.tolist() == [[0, 1, 2], [0, 1, 2]]
    later = right_padded(mask, torch.zeros(2, 1, dtype=torch.int64))[0]
    assert later.tolist() == [[3], [1]]
