"""random-entries: what each query sees is what the definition says, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from passes.random_entries import RandomEntries
from passes.streaming_llm import StreamingLLM
from rewriter import optimize
from rewriter.decoding.state import Session
from rewriter.dialect import OPS
from rewriter.dialect.random_entries import priorities
from rewriter.engine.pipeline import check_conflicts
from rewriter.errors import ConfigError, InputError
from tests.passes.derived import prepared, rewritten, run
from tests.tiny import tiny_llama

TOKENS = torch.arange(40).remainder(61).view(1, 40)
SMALL = RandomEntries(num_random=5, recent_window=3, seed=2)
KNOBS = [(3, 2, 0), (5, 1, 1), (0, 4, 0), (8, 3, 77), (1, 1, 2**32 - 1), (20, 20, 5)]
CHUNKS = ([1] * 30, [30], [7, 1, 1, 5, 16], [2] * 15, [13, 17], [1, 29])
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 9},  # soft-cap, window on every other layer
    "gpt_oss": {"sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1},  # sinks
    "bloom": {"n_head": 4, "n_layer": 2, "hidden_size": 32},  # ALiBi slopes
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},  # positions added to the embeddings
}


def priority(position: int, seed: int) -> int:
    """The hash in unbounded integers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    return mix(position ^ mix((seed + 0x9E3779B9) % 2**32))


def visible(query: int, num_random: int, recent_window: int, seed: int) -> set[int]:
    """The definition: the window, and the older positions with the largest priorities."""
    recent = {j for j in range(query + 1) if query - j < recent_window}
    older = sorted(set(range(query + 1)) - recent, key=lambda j: priority(j, seed))
    return recent | set(older[len(older) - min(num_random, len(older)) :])


class Slots:
    """The state of a program, with the positions in the place of keys."""

    def __init__(self, batch_size: int, num_random: int, recent_window: int, seed: int) -> None:
        self.knobs = {"num_random": num_random, "recent_window": recent_window, "seed": seed}
        self.positions = torch.full((batch_size, num_random + recent_window + 1), -1)
        self.keys = self.positions.clone()

    def __call__(self, new: Tensor) -> list[list[list[int]]]:
        """Feeds positions [batch_size, q_len]; what each of them sees, by row."""
        slots, distance, mask = torch.ops.rewriter.random_entries(self.positions, new, **self.knobs)
        before = self.keys[:, :-1].clone()
        self.keys.scatter_(1, slots, new)
        assert torch.equal(self.keys[:, :-1], self.positions[:, :-1])
        assert self.positions[:, -1].eq(-1).all()
        keys = self.keys[:, :-1] if new.shape[1] == 1 else torch.cat((before, new), dim=1)
        assert torch.equal(distance, new.unsqueeze(2) - keys.unsqueeze(1))
        assert set(mask.unique().tolist()) <= {0.0, -torch.inf}
        seen = mask[:, 0] == 0
        return [[keys[b][s].tolist() for s in row] for b, row in enumerate(seen)]


def follows_the_definition(
    knobs: tuple[int, int, int], positions: Tensor, chunks: list[int]
) -> Tensor:
    """Whatever is fed in chunks sees what it should, once each; the slots at the end, sorted."""
    slots, start = Slots(len(positions), *knobs), 0
    for size in chunks:
        new = positions[:, start : start + size].contiguous()
        for row, queries in zip(new.tolist(), slots(new), strict=True):
            for query, seen in zip(row, queries, strict=True):
                expected = visible(query, *knobs) if query >= 0 else set()
                assert sorted(seen) == sorted(expected), (query, knobs)
        start += size
    return slots.positions.sort(dim=1).values


def left_padded(length: int, *pads: int) -> Tensor:
    return (torch.arange(length) - torch.tensor(pads).unsqueeze(1)).clamp_min(-1)


@pytest.mark.parametrize("knobs", KNOBS)
def test_each_query_sees_what_the_definition_says(knobs: tuple[int, int, int]) -> None:
    kept = [follows_the_definition(knobs, left_padded(30, 0), chunks) for chunks in CHUNKS]
    assert all(torch.equal(kept[0], other) for other in kept)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("knobs", KNOBS)
def test_left_padding(knobs: tuple[int, int, int], chunks: list[int]) -> None:
    follows_the_definition(knobs, left_padded(30, 0, 3, 11, 29), chunks)


def test_padding_between_and_after_tokens() -> None:
    row = [-1, 0, 1, 2, -1, -1, 3, 4, -1, 5, 6, 7, -1, -1, -1, -1, 8, 9, -1, 10]
    for chunks in ([20], [5, 7, 4, 4], [1] * 20, [12, 1, 1, 1, 1, 4]):
        follows_the_definition((3, 2, 1), torch.tensor([row, list(range(20))]), chunks)


def test_long_runs() -> None:
    for chunks in ([64] * 10, [1] * 640, [200, 1, 239, 200]):
        follows_the_definition((20, 7, 3), left_padded(640, 0, 90), chunks)


def test_priorities_are_the_hash_and_never_alike() -> None:
    positions = torch.arange(200_000)
    for seed in (0, 1, 2**32 - 1):
        found = priorities(positions, seed)
        assert found[:500].tolist() == [priority(position, seed) for position in range(500)]
        assert int(found.min()) >= 0 and int(found.max()) < 2**32
        assert found.unique().numel() == len(positions)


def test_every_position_is_as_likely() -> None:
    """Over 4,000 seeds, the share of seeds at which each of 50 stays among 10: 0.2 within 5 sigma."""
    stays = torch.zeros(50)
    for seed in range(4_000):
        stays[priorities(torch.arange(50), seed).topk(10).indices] += 1
    assert (stays / 4_000 - 0.2).abs().max() < 5 * (0.2 * 0.8 / 4_000) ** 0.5


def test_traces() -> None:
    for q_len in (1, 5):
        torch.library.opcheck(
            torch.ops.rewriter.random_entries.default,
            (torch.full((2, 13), -1), left_padded(q_len, 0, 1)),
            {"num_random": 8, "recent_window": 4, "seed": 0},
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_kept_it_is_dense(family: str) -> None:
    model, program = prepared(family, **FAMILIES[family])
    result = rewritten(program, RandomEntries(num_random=38, recent_window=2))
    assert not result.misses and len(result.applied) == 2
    with torch.no_grad():
        expected = model(TOKENS).logits
    for chunks in ([40], [13, 1, 1, 25], [1] * 40):
        found = run(result.program, TOKENS, chunks)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[40], [3, 1, 1, 5, 30], [1] * 40])
def test_like_the_model_under_a_mask_of_what_is_seen(chunks: list[int]) -> None:
    model, program = prepared("llama")
    mask = torch.full((40, 40), torch.finfo(torch.float32).min)
    for query in range(40):
        mask[query, sorted(visible(query, 5, 3, 2))] = 0
    with torch.no_grad():
        expected = model(TOKENS, attention_mask=mask[None, None]).logits
    found = run(rewritten(program, SMALL).program, TOKENS, chunks)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_left_padded_rows_are_as_they_are_alone() -> None:
    program = rewritten(prepared("llama")[1], SMALL).program
    tokens = torch.stack([TOKENS[0, :25], TOKENS[0, 10:35]])
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    for chunks in ([25], [4, 8, 1, 1, 11]):
        found = run(program, tokens, chunks, mask)
        for row, pad in ((0, 0), (1, 9)):
            alone = run(program, tokens[row : row + 1, pad:], [25 - pad])[0]
            torch.testing.assert_close(found[row, pad:], alone, atol=1e-4, rtol=1e-4)


def test_reference_is_the_definition() -> None:
    (applied, _) = rewritten(prepared("llama")[1], SMALL).applied
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, n, 20, 8) for n in (4, 2, 2))
    positions = left_padded(20, 0, 5)
    inputs = (q, k, v, None, None, positions, None, None)
    expected = SMALL.reference(*inputs, facts=applied.facts)
    knobs, scale = (SMALL.num_random, SMALL.recent_window, SMALL.seed), applied.facts.softmax_scale
    for row, pad in ((0, 0), (1, 5)):
        for query in range(pad, 20):
            seen = sorted(j + pad for j in visible(query - pad, *knobs))
            keys, values = (x[row, :, seen].repeat_interleave(2, 0) for x in (k, v))
            weights = torch.einsum("hd,hnd->hn", q[row, :, query], keys).mul(scale).softmax(-1)
            found = torch.einsum("hn,hnd->hd", weights, values)
            torch.testing.assert_close(expected[row, :, query], found, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("method", [RandomEntries(), SMALL, RandomEntries(num_random=0)])
def test_it_ships_verified(method: RandomEntries) -> None:
    report = optimize(tiny_llama(), passes=[method, "default"]).report
    mine = [c for c in report.certificates if c.spec == str(method)]
    assert [c.status for c in mine] == ["applied", "applied"]
    assert all(c.implementation_error <= c.tolerance for c in mine)


def test_the_stress_setting_drops_entries_within_a_check() -> None:
    (applied, _) = rewritten(prepared("llama")[1], RandomEntries()).applied
    stressed = RandomEntries().stress_setting(applied.facts, length=24)
    assert stressed.num_random > 0 and stressed.budget < 24 // 2


def test_one_state_of_positions_and_constant_bytes() -> None:
    program = rewritten(prepared("llama", max_position_embeddings=512)[1], SMALL).program
    assert len(program.calls(OPS["random_entries"].overload)) == 1
    assert len(program.calls(OPS["streaming_attention"].overload)) == 2
    assert program.placeholder("kv_offset") is None and program.placeholder("k_positions") is None
    session = Session(program, 1)
    state_bytes = session.state_bytes()
    for token in range(300):
        assert session.run(torch.tensor([[token % 64]])).isfinite().all()
    assert session.state_bytes() == state_bytes
    for kept in session.kept_positions().values():
        assert sorted(kept[0].tolist()) == [-1, *sorted(visible(299, 5, 3, 2))]


def test_the_models_own_positions_stay_its_limit() -> None:
    program = rewritten(prepared("llama")[1], SMALL).program
    session = Session(program, 1)
    session.run(torch.zeros(1, 128, dtype=torch.int64))
    with pytest.raises(InputError, match="128 positions"):
        session.run(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("random_layer", [0, 1])
def test_beside_streaming_llm_on_another_layer(random_layer: int) -> None:
    model, program = prepared("llama")
    streaming = StreamingLLM(recent_window=40, layers=(1 - random_layer,))
    method = RandomEntries(num_random=40, layers=(random_layer,))
    for passes in ((streaming, method), (method, streaming)):
        result = rewritten(program, *passes)
        decoding = result.program.decoding
        assert len(result.applied) == 2 and decoding is not None
        assert decoding.max_positions == 128 and decoding.max_chunk == 40
        with torch.no_grad():
            expected = model(TOKENS).logits
        found = run(result.program, TOKENS, [30, 1, 9])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_seed_decides() -> None:
    program = prepared("llama")[1]

    def once(seed: int) -> tuple[Tensor, Tensor]:
        method = RandomEntries(num_random=5, recent_window=3, seed=seed)
        session = Session(rewritten(program, method).program, 1)
        return session.run(TOKENS), next(iter(session.kept_positions().values()))

    first, again, other = once(1), once(1), once(2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert set(first[1][0].tolist()) != set(other[1][0].tolist())


def test_a_chunked_mask_is_a_miss() -> None:
    result = rewritten(prepared("llama4_text", attention_chunk_size=16)[1], RandomEntries())
    assert not result.applied
    assert "mask" in result.misses[0].reason and result.misses[0].node


def test_one_bounded_cache_a_layer() -> None:
    streaming, random = StreamingLLM(), RandomEntries()
    for pair in ((streaming, random), (random, streaming), (random, RandomEntries(seed=1))):
        with pytest.raises(ConfigError, match="not together with"):
            check_conflicts(pair)
    check_conflicts((StreamingLLM(layers=(0,)), RandomEntries(layers=(1,))))


@pytest.mark.parametrize(
    "knobs",
    [
        {"num_random": -1},
        {"num_random": 2.5},
        {"recent_window": 0},
        {"recent_window": True},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_knobs_out_of_range(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        RandomEntries(**knobs)
