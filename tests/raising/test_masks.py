"""Masks are understood by what they hide, and never as something they are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter.dialect.attention import visible
from rewriter.raising.attention_regions import AttentionRegion, find_attention
from rewriter.raising.mask_samples import Sample
from rewriter.raising.masks import Classifier, MaskStructure, alibi_slopes, classify
from rewriter.raising.normal_form import normalize
from tests.raising.attention_modules import HEADS, Additive, Explicit, Fused, grid, traced


def sample(rule: Callable[[Tensor, Tensor], Tensor], n: int) -> Sample:
    """A rule over column and row positions, at every position of a length."""
    positions = torch.arange(n)
    keep = rule(positions[:, None], positions[None, :])
    return Sample(positions, positions, keep.expand(n, n)[None], None)


def samples(rule: Callable[[Tensor, Tensor], Tensor]) -> list[Sample]:
    """The lengths that short masks are sampled at."""
    return [sample(rule, n) for n in (1, 3, 8, 33)]


KINDS = st.sampled_from(["sliding_window", "chunked", "prefix", "local"])


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, span=st.integers(2, 30))
def test_the_rule_that_made_a_mask_is_found(kind: str, span: int) -> None:
    def rule(i: Tensor, j: Tensor) -> Tensor:
        return visible(i[:, 0], j[0], kind, span)

    assert classify(samples(rule), [span]) == (kind, span)
    assert classify(samples(rule), []) == (kind, span)


def test_full_and_causal() -> None:
    assert classify(samples(lambda i, j: i >= 0), []) == ("full", 0)
    assert classify(samples(lambda i, j: j <= i), []) == ("causal", 0)


WRONG = {
    "strictly causal": lambda i, j: j < i,
    "one ahead": lambda i, j: j <= i + 1,
    "one hole": lambda i, j: (j <= i) & ~((i == 20) & (j == 3)),
    "anti-causal": lambda i, j: j >= i,
    "nothing": lambda i, j: (i < 0) | (j < 0),
    "dilated": lambda i, j: (j <= i) & ((i - j) % 3 == 0),
    "window and prefix": lambda i, j: (j <= i) & ((i - j < 4) | (j < 2)),
    "block diagonal": lambda i, j: i // 4 == j // 4,
}


@pytest.mark.parametrize("rule", WRONG.values(), ids=WRONG)
def test_a_mask_that_is_almost_a_rule_is_none(rule: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert classify(samples(rule), [3, 4]) is None


def test_a_window_that_the_samples_do_not_pin_down_is_not_guessed() -> None:
    """At positions 0, 50 and 100 every window of 51 to 100 looks the same."""
    positions = torch.tensor([0, 50, 100])
    keep = visible(positions, positions, "sliding_window", 60)[None]
    assert classify([Sample(positions, positions, keep, None)], [60]) is None


def structure(module: nn.Module) -> MaskStructure:
    """What the masks of a module's one attention mean."""
    program = traced(module)
    normalize(program)
    (region,) = find_attention(program)
    assert isinstance(region, AttentionRegion)
    return Classifier(program).describe(region.scores.terms, HEADS, causal=region.causal)


def window(span: int) -> Callable[[int], Tensor]:
    """A sliding window as models write it."""

    def mask(n: int) -> Tensor:
        i, j = grid(n)
        return (j <= i) & (j > i - span)

    return mask


@pytest.mark.parametrize("spelling", [Explicit, Additive, Fused])
def test_a_window_longer_than_every_short_sample_is_no_causal_mask(
    spelling: type[Explicit],
) -> None:
    assert str(structure(spelling(window(32768)))) == "sliding_window(32768)"


def test_a_chunk_longer_than_every_short_sample() -> None:
    def chunked(n: int) -> Tensor:
        i, j = grid(n)
        return (j <= i) & (i // 8192 == j // 8192)

    assert str(structure(Explicit(chunked))) == "chunked(8192)"


class Buffered(Explicit):
    """The mask is a slice of a square buffer: its window is in the data, not in the graph."""

    def __init__(self, span: int) -> None:
        super().__init__()
        self.register_buffer("table", window(span)(512))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bsd."""
        n = q.shape[1]
        self.mask = lambda n: self.table[:n, :n]  # pyright: ignore
        torch._check(n <= 512)
        return super().forward(q, k, v)


def test_a_window_in_a_buffer_is_found() -> None:
    assert str(structure(Buffered(200))) == "sliding_window(200)"


def test_a_mask_of_the_contents_stays_a_tensor() -> None:
    class Contents(Explicit):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.mask = lambda n: (q[..., 0] > 0)[:, None, None, :]  # pyright: ignore
            return super().forward(q, k, v)

    found = structure(Contents())
    assert (found.kind, len(found.bias), str(found)) == ("full", 1, "other")
    assert "depends on the values of x" in found.misses[0].reason


def test_slopes_need_the_same_slope_everywhere() -> None:
    i, j = torch.arange(9)[:, None], torch.arange(9)[None, :]
    keep = (j <= i)[None]

    def found(added: Tensor) -> Tensor | None:
        positions = torch.arange(9)
        return alibi_slopes([Sample(positions, positions, keep, (added * keep).double())], 2)

    slopes = torch.tensor([0.5, 0.25]).view(2, 1, 1)
    torch.testing.assert_close(found(slopes * (j - i)), slopes.flatten())
    torch.testing.assert_close(found(slopes * j.expand(9, 9)), slopes.flatten())
    assert found(slopes * (j - i) + 0.1 * (j == 4)) is None
    assert found(slopes * (j - i) ** 2) is None
