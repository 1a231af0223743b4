"""The scripts that train and measure the reference models, and the model that is shipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewriter import optimize
from rewriter.quality.accuracy import draw_samples, grade
from rewriter.quality.encoding import Encoding
from rewriter.quality.tasks import TASKS

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "reference_models"
REASONER = ROOT / "examples" / "models" / "reasoner"
NAMES = ("train", "attention", "evaluate", "sequences", "tokenizer", "muon", "sparse_mlp")


@pytest.fixture(scope="module")
def scripts():
    """The modules by name; they stand beside each other, so their folder is on the path."""
    sys.path.insert(0, str(SCRIPTS))
    yield {name: __import__(name) for name in NAMES}
    sys.path.remove(str(SCRIPTS))
    for name in NAMES:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def tokenizer(scripts):
    return scripts["tokenizer"].build_tokenizer(512)


@pytest.fixture(scope="module")
def reasoner():
    model = AutoModelForCausalLM.from_pretrained(REASONER, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(REASONER)


def test_the_tokenizer_knows_every_word_of_every_task(tokenizer):
    encoding = Encoding(tokenizer, len(tokenizer))
    for task in TASKS.values():
        encoding.check(task)
    text = "ada abel has 14 apples. gets 3 bags of 8. how many?"
    assert tokenizer.decode(encoding.ids(text)).split() == (
        "ada abel has 1 4 apples . gets 3 bags of 8 . how many ?".split()
    )


@pytest.mark.parametrize("length", [64, 600])
def test_rows_begin_with_a_beginning_and_teach_only_answers(scripts, tokenizer, length):
    ids, labels = scripts["sequences"].Sequences(tokenizer, 0).batch(8, length, 0.5)
    assert ids.shape == labels.shape == (8, length)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    learned = labels >= 0
    assert (labels[:, :-1] == ids[:, 1:])[learned[:, :-1]].all()
    assert 0.05 < learned.mean() < 0.95
    questions = ids == tokenizer.convert_tokens_to_ids("?")
    assert not learned[:, :-1][questions[:, 1:]].any()  # no question mark is to be predicted


def test_the_same_seed_trains_the_same_model(scripts, tokenizer, monkeypatch):
    train = scripts["train"]
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 1024)

    def trained():
        torch.manual_seed(0)
        specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        model, losses = train.new_model(len(tokenizer), *specials), []
        plan = train.Plan(steps=3)
        with torch.enable_grad():
            train.train(model, tokenizer, plan, lambda *a: losses.append(a))
        return model, losses

    (first, losses), (second, again) = trained(), trained()
    assert losses == again and losses[-1][2] < losses[0][2]
    assert [(step, last) for step, last, _ in losses] == [(1, False), (2, False), (3, True)]
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_training_ends_when_its_time_is_over(scripts, tokenizer, monkeypatch):
    train = scripts["train"]
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 512)
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model, ends = train.new_model(len(tokenizer), *specials), []
    with torch.enable_grad():
        plan = train.Plan(steps=1000, minutes=1e-9)
        train.train(model, tokenizer, plan, lambda *a: ends.append(a[1]))
    assert ends == [True]


@pytest.mark.parametrize("length", [1, 7, 256, 600])
def test_tiled_attention_has_the_gradients_of_attention(scripts, length):
    rng = torch.Generator().manual_seed(length)
    tensors = [torch.randn(2, h, length, 16, generator=rng, requires_grad=True) for h in (4, 2, 2)]
    grad = torch.randn(2, 4, length, 16, generator=rng)
    with torch.enable_grad():
        theirs = functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
        ours, _ = scripts["attention"].tiled_attention(*tensors, 16**-0.5)
        expected = torch.autograd.grad(theirs, tensors, grad)
        found = torch.autograd.grad(ours, tensors, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(3, 40, 20), (20, 40), (16, 16)])
def test_muon_steps_are_about_orthogonal(scripts, shape):
    x = torch.randn(shape, generator=torch.manual_seed(0))
    values = torch.linalg.svdvals(scripts["muon"].orthogonal(x))
    assert values.max() < 1.3
    assert values.mean() > 0.7


def test_only_the_most_active_neurons_count(scripts, reasoner):
    model, keep = reasoner[0], scripts["sparse_mlp"].keep_active_neurons
    ids = torch.arange(20).view(1, 20)
    seen = []
    with torch.no_grad():
        whole = model(ids).logits
        with keep(model, 1.0):
            assert torch.equal(model(ids).logits, whole)
        with keep(model, 0.25):
            down = model.model.layers[0].mlp.down_proj
            hook = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            assert not torch.allclose(model(ids).logits, whole)
            hook.remove()
        assert torch.equal(model(ids).logits, whole)
    active = (seen[0] != 0).sum(-1)
    assert (active == round(0.25 * model.config.intermediate_size)).all()


def card_rows() -> list[tuple[str, int, float]]:
    """Task, entries and share of right answers, as the card says."""
    lines = (REASONER / "README.md").read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    rows = [row for row in cells if len(row) == 4 and row[0] in TASKS]
    return [(task, int(size or 0), float(right[:-1]) / 100) for task, size, _, right in rows]


@pytest.mark.parametrize("task", ["arithmetic", "people", "retrieval"])
def test_the_reasoner_can_do_what_its_card_says(scripts, reasoner, task):
    model, tokenizer = reasoner
    _, size, said = next(row for row in card_rows() if row[0] == task)
    with torch.no_grad():
        found = scripts["evaluate"].accuracy(model, tokenizer, task, size, 80, seed=5)
    assert said > 0.05
    assert abs(found - said) < 0.2


@pytest.mark.parametrize(
    "spec",
    [
        "random-entries{num_random=120,recent_window=40}",
        "streaming-llm{num_sink_tokens=0,recent_window=160}",
    ],
)
def test_large_scores_are_not_taken_for_faults(reasoner, spec):
    certificates = optimize(reasoner[0], passes=[spec]).report.certificates
    assert [c.status for c in certificates] == ["applied"] * 4
    assert max(c.implementation_error for c in certificates) < 1e-4


def test_the_reasoner_forgets_what_its_cache_dropped(reasoner):
    model, tokenizer = reasoner
    encoding = Encoding(tokenizer, model.config.vocab_size)
    samples = draw_samples("retrieval", encoding, 300, 16, 4, seed=0)
    passes = ["streaming-llm{num_sink_tokens=4,recent_window=146}", "default"]
    with torch.no_grad():
        grades = grade(optimize(model, passes=passes), encoding, samples, ["multi-request"])[
            "multi-request"
        ]
    right = {0.0: [], 1.0: []}
    for held, scores in zip(grades.held, grades.right, strict=True):
        for share, score in zip(held, scores, strict=True):
            right[share].append(score)
    kept, dropped = (sum(right[share]) / len(right[share]) for share in (1.0, 0.0))
    assert len(right[0.0]) > 15 < len(right[1.0])
    assert kept > 0.7 and dropped < 0.1
