"""Whatever mixes tokens besides causal attention is found, near or far, strong or faint."""

import pytest
import torch
from torch.nn import functional

from rewriter.capture.causal_lm import capture_causal_lm
from rewriter.decoding.derive import derive
from rewriter.decoding.mixing import _kept_sets
from rewriter.decoding.state import Session
from rewriter.engine.miss import Miss
from rewriter.program import Program
from rewriter.raising import raise_program
from tests.decoding.mixers import with_operator


def shifted(hidden, by):
    return functional.pad(hidden, (0, 0, by, 0))[:, : hidden.shape[1]]


MIXING = {
    "mean": (lambda h: h.mean(1, keepdim=True).expand_as(h), "mean"),
    "faint mean": (lambda h: 1e-6 * h.mean(1, keepdim=True).expand_as(h), "mean"),
    "batch mean": (lambda h: h.mean(0, keepdim=True).expand_as(h), "mean"),
    "first token": (lambda h: h[:, :1].expand_as(h), "slice"),
    "last token": (lambda h: h[:, -1:].expand_as(h), "slice"),
    "softmax over tokens": (lambda h: h.softmax(1), "softmax"),
    "running maximum": (lambda h: h.cummax(1).values, "cummax"),
    "sorted": (lambda h: h.sort(1).values, "sort"),
    "rolled": (lambda h: h.roll(20, 1), "roll"),
    "one back": (lambda h: shifted(h, 1), "pad"),
    "forty back": (lambda h: shifted(h, 40), "pad"),
}


def derived(extra):
    raised = capture_causal_lm(with_operator(extra))
    raise_program(raised)
    return derive(raised)


@pytest.mark.parametrize("name", MIXING)
def test_an_operator_that_mixes_tokens_is_named_with_its_source(name):
    extra, operator = MIXING[name]
    miss = derived(extra)
    assert isinstance(miss, Miss)
    assert operator in miss.reason
    assert "mixes tokens" in miss.reason
    assert "mixers.py" in miss.source


def test_further_back_than_any_probe_is_declined():
    miss = derived(lambda h: shifted(h, 5000))
    assert isinstance(miss, Miss)
    assert "pad" in miss.reason


def test_what_depends_on_the_number_of_tokens_is_declined():
    miss = derived(lambda h: h * (h.shape[1] * 0.01))
    assert isinstance(miss, Miss)
    assert "how many tokens" in miss.reason


def test_positions_counted_inside_the_model_are_read_from_the_input():
    def weighted(hidden):
        return hidden * torch.arange(hidden.shape[1])[None, :, None] * 0.01

    program = derived(weighted)
    assert isinstance(program, Program)
    ids = torch.randint(3, 128, (2, 20))
    session = Session(program, 2)
    together = torch.cat([session.run(part) for part in ids.split((9, 1, 10), dim=1)], 1)
    expected = with_operator(weighted)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [2, 3, 13, 64])
def test_every_pair_of_tokens_is_told_apart(length):
    kept = _kept_sets(length)
    apart = (kept[:, :, None] & ~kept[:, None, :]).any(0)
    assert torch.equal(apart, ~torch.eye(length, dtype=torch.bool))
