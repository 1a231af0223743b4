"""streaming-llm on whole models: exact with everything kept, else like the slow reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from passes.streaming_llm import StreamingLLM
from rewriter.decoding.state import Session
from rewriter.dialect import OPS
from rewriter.errors import ConfigError
from tests.passes.derived import derived, prepared, rewritten, run
from tests.passes.slow_llama import SlowLlama

CHECKED = ((0, 600), (5_000, 5_001), (12_345, 12_350), (19_980, 20_000))
"""Steps of the endless run, [first, last), that are compared."""
TOKENS = torch.arange(40).remainder(61).view(1, 40)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},  # q and k are normalised before they turn
    "gemma2": {"sliding_window": 9},  # soft-cap, window on every other layer
    "gpt_oss": {"sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1},  # sinks
    "gpt_neox": {"rotary_pct": 0.5},  # partial rotation
    "smollm3": {"no_rope_layers": [0, 1]},  # a layer that does not rotate
    "bloom": {"n_head": 4, "n_layer": 2, "hidden_size": 32},  # ALiBi slopes
}


def slow_logits(model: PreTrainedModel, knobs: StreamingLLM, tokens: torch.Tensor) -> torch.Tensor:
    slow = SlowLlama(model, knobs.num_sink_tokens, knobs.recent_window)
    with torch.no_grad():
        return torch.stack([slow.step(int(token)) for token in tokens])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_kept_it_is_dense(family: str) -> None:
    model, program = prepared(family, **FAMILIES[family])
    result = rewritten(program, StreamingLLM(recent_window=40))
    assert not result.misses and len(result.applied) == 2
    with torch.no_grad():
        expected = model(TOKENS).logits
    for chunks in ([40], [13, 1, 1, 25], [1] * 40):
        found = run(result.program, TOKENS, chunks)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("knobs", [(4, 8), (0, 6), (2, 13)])
def test_like_the_slow_reference(knobs: tuple[int, int]) -> None:
    model, program = prepared("llama")
    method = StreamingLLM(num_sink_tokens=knobs[0], recent_window=knobs[1])
    program = rewritten(program, method).program
    expected = slow_logits(model, method, TOKENS[0]).float()
    for chunks in ([40], [3, 1, 1, 5, 30], [1] * 40):
        torch.testing.assert_close(run(program, TOKENS, chunks)[0], expected, atol=1e-4, rtol=1e-4)


def test_left_padding() -> None:
    model, program = prepared("llama")
    method = StreamingLLM(num_sink_tokens=2, recent_window=6)
    program = rewritten(program, method).program
    tokens = torch.stack([TOKENS[0, :25], TOKENS[0, 10:35]])
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    for chunks in ([25], [4, 8, 1, 1, 11]):
        found = run(program, tokens, chunks, mask)
        for row, pad in ((0, 0), (1, 9)):
            expected = slow_logits(model, method, tokens[row, pad:]).float()
            torch.testing.assert_close(found[row, pad:], expected, atol=1e-4, rtol=1e-4)


def test_reference_is_what_the_operators_compute() -> None:
    method = StreamingLLM(num_sink_tokens=2, recent_window=6)
    (applied, _) = rewritten(prepared("llama")[1], method).applied
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, n, 20, 8) for n in (4, 2, 2))
    positions = (torch.arange(20) - torch.tensor([[0], [5]])).clamp_min(-1)
    inv_freq = 10000.0 ** -(torch.arange(4) / 4)
    angles = positions.clamp_min(0)[:, None, :, None] * inv_freq
    inputs = (q, k, v, angles.cos(), angles.sin(), positions, None, None)
    expected = method.reference(*inputs, facts=applied.facts)
    ring, values, slot_positions = (
        torch.zeros(2, 2, 9, 8),
        torch.zeros(2, 2, 9, 8),
        torch.full((2, 9), -1),
    )
    for at in range(20):
        part = slice(at, at + 1)
        *entries, ranks = torch.ops.rewriter.streaming_entries(
            slot_positions, positions[:, part], num_sink_tokens=2, recent_window=6
        )
        turned = ranks[:, None, :, None] * inv_freq
        found = torch.ops.rewriter.streaming_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], ring, values, *entries,
            turned.cos(), turned.sin(),
            softmax_scale=applied.facts.softmax_scale, num_sink_tokens=2,
        )  # fmt: skip
        torch.testing.assert_close(found, expected[:, :, part], atol=2e-6, rtol=1e-5)


def test_layers_share_positions_and_tables() -> None:
    program = rewritten(prepared("llama")[1], StreamingLLM(recent_window=8)).program
    assert len(program.calls(OPS["streaming_entries"].overload)) == 1
    first, second = program.calls(OPS["streaming_attention"].overload)
    assert first.args[5:10] == second.args[5:10]
    assert not program.calls(OPS["kv_append"].overload)
    assert program.placeholder("kv_offset") is None and program.placeholder("k_positions") is None
    assert program.decoding is not None
    assert all(state.bounded for state in program.decoding.states)
    assert program.decoding.max_positions is None and program.decoding.max_chunk == 8


def test_some_layers_only() -> None:
    model, program = prepared("llama")
    result = rewritten(program, StreamingLLM(recent_window=40, layers=(1,)))
    assert len(result.applied) == 1
    decoding = result.program.decoding
    assert decoding is not None and decoding.max_positions == 128
    assert [state.bounded for state in decoding.states].count(False) == 2
    with torch.no_grad():
        expected = model(TOKENS).logits
    found = run(result.program, TOKENS, [30, 1, 9])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "positions are added before the keys"),
        ("llama4_text", {"attention_chunk_size": 16}, "mask"),
    ],
)
def test_misses(family: str, changes: dict[str, Any], reason: str) -> None:
    result = rewritten(prepared(family, **changes)[1], StreamingLLM())
    assert not result.applied
    assert reason in result.misses[0].reason and result.misses[0].node


@pytest.mark.parametrize(
    "knobs",
    [
        {"recent_window": 0},
        {"num_sink_tokens": -1},
        {"recent_window": 2.5},
        {"num_sink_tokens": True},
    ],
)
def test_knobs_out_of_range(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        StreamingLLM(**knobs)


@pytest.mark.timeout(600)
def test_endless(stories260k: Path) -> None:
    """20,000 tokens: constant memory, finite, and like the slow reference wherever it is checked.

    A token reaches back through at most W entries a layer and the sinks, so from the sinks and the
    last layers · W tokens the reference rebuilds the whole state, whatever the program did before.
    """
    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    method = StreamingLLM(num_sink_tokens=4, recent_window=252)
    session = Session(rewritten(derived(model), method).program, 1)
    state_bytes, tokens, checked = session.state_bytes(), [1], {}
    for step in range(20_000):
        logits = session.run(torch.tensor([[tokens[-1]]]))[0, -1]
        assert logits.isfinite().all()
        if any(first <= step < last for first, last in CHECKED):
            checked[step] = logits.double()
        tokens.append(int(logits.argmax()))
    assert session.state_bytes() == state_bytes
    slow = SlowLlama(model, method.num_sink_tokens, method.recent_window)
    rebuild = model.config.num_hidden_layers * method.recent_window
    with torch.no_grad():
        for first, last in CHECKED:
            slow.forget_recent()
            for step in range(max(first - rebuild, method.num_sink_tokens if first else 0), last):
                expected = slow.step(tokens[step])
                if step >= first:
                    torch.testing.assert_close(checked[step], expected, atol=1e-3, rtol=1e-3)
