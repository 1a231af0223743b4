"""grouped-attention on whole models."""

from __future__ import annotations

import pytest
import torch

from passes.grouped_attention import GroupedAttention
from rewriter.cost.work import total
from rewriter.dialect import OPS
from tests.passes.derived import prepared, rewritten, run

TOKENS = torch.arange(40).remainder(61).view(2, 20)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_same_logits(family: str) -> None:
    model, program = prepared(family)
    result = rewritten(program, GroupedAttention())
    assert not result.misses and len(result.applied) == 2
    assert not result.program.calls(OPS["attention"].overload)
    with torch.no_grad():
        expected = model(TOKENS).logits
    for chunks in ([20], [7, 1, 1, 11], [1] * 20):
        found = run(result.program, TOKENS, chunks)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert "rewriter.grouped_attention" in result.program.code


def test_left_padding() -> None:
    model, program = prepared("llama")
    program = rewritten(program, GroupedAttention()).program
    mask = torch.ones_like(TOKENS)
    mask[0, :6] = 0
    with torch.no_grad():
        alone = model(TOKENS[:1, 6:]).logits
    for chunks in ([20], [4, 4, 1, 1, 10]):
        found = run(program, TOKENS, chunks, mask)[:1, 6:]
        torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)


def test_ungrouped_heads_are_a_miss() -> None:
    _, program = prepared("llama", num_key_value_heads=4)
    result = rewritten(program, GroupedAttention())
    assert not result.applied and len(result.misses) == 2
    assert "not grouped: 4 on 4" in result.misses[0].reason
    assert result.misses[0].source


def test_predicts_less_traffic_than_what_it_replaces() -> None:
    first = rewritten(prepared("llama")[1], GroupedAttention()).applied[0]
    rewrite = GroupedAttention()
    before, after = total(rewrite.original_work(first.facts)), total(rewrite.work(first.facts))
    assert 0 < after.bytes_moved < before.bytes_moved
