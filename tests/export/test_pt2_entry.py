"""Entries as graphs: what a .pt2 will compute, before anything is compiled."""

from __future__ import annotations

import functools

import pytest
import torch

from rewriter import optimize
from rewriter.decoding.state import Session
from rewriter.dialect import OPS
from rewriter.dialect.moe import moe
from rewriter.export.pt2_entry import Limits, has_entry_positions, state_buffer, token_entries
from rewriter.export.pt2_plain import demand_aten, dense_moe
from tests.tiny import tiny_causal_lm, token_ids

LIMITS = Limits(batch=2, max_length=40)
PASSES = {
    "no passes": [],
    "default": "default",
    "streaming-llm": ["default", "streaming-llm{num_sink_tokens=2,recent_window=18}"],
    "int8-weights": ["default", "int8-weights"],
    "random-entries": ["default", "random-entries{num_random=6,recent_window=18}"],
}


@functools.cache
def program_of(family, passes, layers=1):
    model = tiny_causal_lm(family, num_hidden_layers=layers)
    return optimize(model, passes=PASSES[passes], backend="eager", verify=False).program


def call(entry, ids, positions, entry_positions, rows):
    """An entry on the inputs that it has."""
    given = {"input_ids": ids, "positions": positions, "entry_positions": entry_positions}
    given["rows"] = rows
    return entry.module(*[given[spec.name].contiguous() for spec in entry.inputs])[0]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padded"])
@pytest.mark.parametrize("passes", list(PASSES))
def test_prompts_chunks_and_steps(passes, padded):
    program = program_of("llama", passes)
    _compare(program, padded)


@pytest.mark.parametrize("family", ["gemma2", "bloom", "mixtral"])
def test_families(family):
    _compare(program_of(family, "default", layers=2), padded=False)


def _compare(program, padded):
    """Calls of 7, 1, 6 and 1 tokens, beside a session of the program."""
    prefill, decode = token_entries(program, LIMITS)
    for spec in program.decoding.states:  # both write to one state
        name = state_buffer(spec.name)
        setattr(decode.module, name, getattr(prefill.module, name))
    ids = token_ids(2, 15)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0 if padded else 1
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
    session, start = Session(program, 2), 0
    for size in (7, 1, 6, 1):
        part = slice(start, start + size)
        given = mask[:, part] if padded else None
        expected = session.run(ids[:, part], attention_mask=given)
        entry = decode if size == 1 else prefill
        rows = torch.tensor([size - 1])
        found = call(entry, ids[:, part], positions[:, part], positions[:, : part.stop], rows)
        torch.testing.assert_close(found, expected[:, -1:], rtol=2e-4, atol=2e-4)
        start += size


@pytest.mark.parametrize("passes", ["default", "int8-weights", "streaming-llm"])
def test_a_trace_is_aten_alone_and_keeps_its_sizes_open(passes):
    program = program_of("llama", passes)
    for entry in token_entries(program, LIMITS):
        exported = torch.export.export(
            entry.module, entry.example, dynamic_shapes=entry.dynamic_shapes(), strict=False
        )
        demand_aten(exported)
        least = {int(bounds.lower) for bounds in exported.range_constraints.values()}
        assert least <= {0, 1, 2}
        assert not {node.target for node in exported.graph.nodes} & {
            op.overload for op in OPS.values()
        }


def test_entry_positions_are_asked_for_where_a_state_grows():
    names = {
        passes: [spec.name for spec in token_entries(program_of("llama", passes), LIMITS)[0].inputs]
        for passes in ("default", "streaming-llm")
    }
    assert names["default"] == ["input_ids", "positions", "entry_positions", "rows"]
    assert names["streaming-llm"] == ["input_ids", "positions", "rows"]
    assert has_entry_positions(program_of("llama", "default").decoding)


@pytest.mark.parametrize("gating", ["halves", "pairs", "none"])
@pytest.mark.parametrize("biased", [False, True])
def test_all_experts_are_the_chosen_ones(gating, biased):
    x, width = torch.randn(5, 8), 6 if gating == "none" else 12
    index = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    weight = torch.rand(5, 2)
    up, down = torch.randn(4, width, 8), torch.randn(4, 8, 6)
    biases = (torch.randn(4, width), torch.randn(4, 8)) if biased else (None, None)
    options = {"activation": "silu", "gating": gating}
    expected = moe.reference(x, index, weight, up, down, *biases, **options)
    found = dense_moe(x, index, weight, up, down, *biases, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
