"""Each measure against its definition, worked out the slow way."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch

from rewriter.errors import InputError
from rewriter.quality.agreement import common_prefixes, greedy_continuations
from rewriter.quality.bootstrap import mean_interval
from rewriter.quality.decode import continue_greedily, feed
from rewriter.quality.fidelity import NEVER, compare
from rewriter.quality.retained_mass import first_token_mass, retained_mass

SMALL = "streaming-llm{num_sink_tokens=2,recent_window=6}"
WHOLE = "streaming-llm{num_sink_tokens=2,recent_window=60}"


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(3, model.config.vocab_size, (3, 24), generator=torch.manual_seed(1))


@pytest.fixture(scope="module")
def traces(optimized, ids):
    with torch.no_grad():
        return compare(optimized(), [optimized(), optimized(SMALL), optimized(WHOLE)], ids)


def visible(query: int, sinks: int = 2, window: int = 6) -> set[int]:
    return {j for j in range(query + 1) if j < sinks or query - j < window}


def test_dense_against_dense_is_zero(traces):
    own, dense, *_ = traces
    for trace in (own, dense):
        assert trace.kl.eq(0).all() and trace.agrees.all()
    assert torch.equal(own.nll, dense.nll)


def test_kl_and_nll_are_those_of_the_logits(model, optimized, ids, traces):
    with torch.no_grad():
        original = model(ids).logits.log_softmax(-1)
        changed = optimized(SMALL)(ids).logits.log_softmax(-1)
    kl = (original.exp() * (original - changed)).sum(-1)
    own, _, small, _ = traces
    torch.testing.assert_close(small.kl.float(), kl, atol=1e-4, rtol=1e-3)
    assert small.kl[:, :8].max() < 1e-5 < 1e-2 < small.kl[:, 8:].mean()
    nll = -original[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(own.nll.float(), nll, atol=1e-4, rtol=1e-4)
    agrees = original.argmax(-1) == changed.argmax(-1)
    assert torch.equal(small.agrees, agrees) and not agrees.all()


def test_everything_kept_equals_dense(traces):
    whole = traces[3]
    assert whole.kl.max() < 1e-6 and whole.agrees.all()
    assert (whole.evicted_ago == NEVER).all()


def test_kept_entries_and_evictions_are_those_of_the_rule(traces):
    small = traces[2]
    assert sorted(small.kept) == [0, 1]
    for kept in small.kept.values():
        for query in range(24):
            found = set(kept[0, query].nonzero()[:, 0].tolist())
            assert found == visible(query)
    assert (small.evicted_ago[:, :8] == NEVER).all() and (small.evicted_ago[:, 8:] == 0).all()


def test_retained_mass_is_that_of_the_models_own_attention(model, optimized, ids, traces):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probabilities = model(ids, output_attentions=True).attentions
        found = retained_mass(optimized().program, ids, [traces[2], traces[3]])
    model.set_attn_implementation("sdpa")
    mine, best = [], []
    for layer in probabilities:
        for query in range(8, 24):
            row = layer[:, :, query]
            mine.append(row[..., sorted(visible(query))].sum(-1))
            best.append(row.topk(8, dim=-1).values.sum(-1))
    assert found[0].variant == pytest.approx(float(torch.stack(mine).mean()), abs=1e-4)
    assert found[0].oracle == pytest.approx(float(torch.stack(best).mean()), abs=1e-4)
    assert found[0].variant < found[0].oracle < 1
    assert (found[1].variant, found[1].oracle) == (1, 1)


def test_mass_on_the_first_token_is_that_of_the_models_own_attention(model, optimized, ids):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probabilities = model(ids, output_attentions=True).attentions
        found = first_token_mass(optimized().program, ids, skip=4)
    model.set_attn_implementation("sdpa")
    expected = [layer[:, :, 4:, 0].mean((0, 2)) for layer in probabilities]
    torch.testing.assert_close(torch.tensor(found), torch.stack(expected), atol=1e-4, rtol=1e-3)


def test_greedy_continuations_are_those_of_generate(model, optimized, ids):
    with torch.no_grad():
        mine = greedy_continuations(optimized(), ids, 12)
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=-1,
        )
    assert mine == whole[:, 24:].tolist()


def test_prompts_of_different_lengths_go_on_together(optimized):
    prompts = [[5, 6, 7], [8], [9, 10]]
    together = optimized().session(3)
    texts = continue_greedily(together, feed(together, prompts), 8)
    for prompt, text in zip(prompts, texts, strict=True):
        alone = optimized().session(1)
        assert continue_greedily(alone, feed(alone, [prompt]), 8) == [text]


def test_replies_stop_at_their_end(optimized):
    session = optimized().session(1)
    text = continue_greedily(session, feed(session, [[5, 6]]), 8)[0]
    again = optimized().session(1)
    stopped = continue_greedily(again, feed(again, [[5, 6]]), 8, lambda token: token == text[2])
    assert stopped == [text[: text.index(text[2]) + 1]]


@pytest.mark.parametrize("spec", [(), (SMALL,)])
def test_a_forked_session_goes_its_own_way(optimized, ids, spec):
    with torch.no_grad():
        session, untouched = (optimized(*spec).session(1) for _ in range(2))
        for one in (session, untouched):
            one.run(ids[:1, :12])
        copies = session.fork(3)
        copies.run(ids[:, 12:20])
        same = session.run(ids[:1, 12:20])
        assert torch.equal(same, untouched.run(ids[:1, 12:20]))
        rows = copies.run(ids[:, 20:])
        torch.testing.assert_close(rows[0], session.run(ids[:1, 20:])[0], atol=1e-4, rtol=1e-4)


def test_several_rows_do_not_become_another_number(optimized, ids):
    session = optimized().session(3)
    session.run(ids)
    assert session.fork().batch_size == 3
    with pytest.raises(InputError, match="batch_size=2 is not allowed: 3 rows"):
        session.fork(2)


def test_common_prefixes():
    assert common_prefixes(
        [[1, 2, 3], [1, 2, 3], [4, 4, 4]], [[1, 2, 3], [1, 9, 3], [5, 4, 4]]
    ) == [
        3,
        1,
        0,
    ]


def test_intervals_cover_the_mean_and_shrink_with_samples():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        groups = [[float(v)] for v in rng.random(40) < 0.3]
        interval = mean_interval(groups, seed=seed)
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 199
    few, many = (mean_interval([[float(i % 2)] for i in range(n)]) for n in (10, 1000))
    assert few.mean == many.mean == 0.5 and many.high - many.low < few.high - few.low


def test_questions_of_one_context_are_drawn_together():
    groups = [[float(Random(i).random() < 0.5)] * 20 for i in range(20)]
    apart = [[value] for group in groups for value in group]
    together, alone = mean_interval(groups), mean_interval(apart)
    assert together.mean == pytest.approx(alone.mean)
    assert (together.high - together.low) > 3 * (alone.high - alone.low)
    assert math.isclose(mean_interval([[1.0], [1.0]]).low, 1.0)
