"""Attention is raised from every spelling, computes the same, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter.engine.site import bound_arguments
from rewriter.program import Program
from rewriter.raising import agreement
from rewriter.raising.attention import attention_coverage, raise_attention
from rewriter.raising.normal_form import normalize
from tests.raising.attention_modules import (
    HEADS,
    WIDTH,
    Additive,
    Bias,
    Einsum,
    Explicit,
    Flattened,
    Fused,
    Grouped,
    OneInput,
    Sinks,
    Softcapped,
    causal,
    grid,
    heads,
    merge,
    packed,
    traced,
)

ATTENTION = torch.ops.rewriter.attention.default


def raised(module: nn.Module, kv_width: int = HEADS * WIDTH) -> tuple[Program, list[fx.Node]]:
    """The raised program and its attentions; checks that it computes what the module does."""
    program = traced(module, kv_width)
    normalize(program)
    misses = raise_attention(program)
    assert [m for m in misses if m.subject == "raise-attention"] == []
    for batch_size, n in ((1, 1), (3, 5), (2, 19)):
        x = packed(batch_size, n, kv_width)
        expected = OneInput(module, kv_width)(x)
        torch.testing.assert_close(program(x=x)[0], expected, atol=1e-5, rtol=1e-5)
    return program, program.calls(ATTENTION)


SPELLINGS = [Explicit(), Additive(), Fused(), Einsum(), Softcapped(), Flattened(), Sinks()]


@pytest.mark.parametrize("module", SPELLINGS, ids=lambda module: type(module).__name__)
def test_every_spelling_becomes_one_causal_attention(module: nn.Module) -> None:
    _, (node,) = raised(module)
    arguments = bound_arguments(node)
    assert (arguments["mask"], arguments["bias"]) == ("causal", None)
    assert arguments["softmax_scale"] == pytest.approx(0.3)
    assert arguments["softcap"] == (5.0 if isinstance(module, Softcapped) else 0.0)
    assert (arguments["sinks"] is not None) == isinstance(module, Sinks)
    assert (arguments["slopes"] is not None) == isinstance(module, Flattened)


def test_alibi_becomes_slopes() -> None:
    program, (node,) = raised(Flattened())
    slopes = program.module.get_buffer(bound_arguments(node)["slopes"].target)
    torch.testing.assert_close(slopes, torch.tensor([0.5, 0.25, 0.125, 0.0625]))


def test_a_sliding_window_keeps_its_span() -> None:
    def window(n: int) -> Tensor:
        i, j = grid(n)
        return (j <= i) & (j > i - 300)

    program, (node,) = raised(Explicit(window))
    assert (node.kwargs["mask"], node.kwargs["span"]) == ("sliding_window", 300)
    assert attention_coverage(program, []).kinds == ("sliding_window(300)",)


REPEATS = {
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "expand": lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
}


@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
def test_repeated_keys_and_values_are_peeled(repeat: object) -> None:
    _, (node,) = raised(Grouped(repeat), kv_width=2 * WIDTH)  # pyright: ignore
    assert [x.meta["val"].shape[1] for x in node.args[:3]] == [4, 2, 2]


def test_heads_repeated_in_another_order_are_not_peeled() -> None:
    _, (node,) = raised(Grouped(lambda x: x.repeat(1, 2, 1, 1)), kv_width=2 * WIDTH)
    assert [x.meta["val"].shape[1] for x in node.args[:3]] == [4, 4, 4]


def test_a_learned_bias_stays_a_tensor() -> None:
    _, (node,) = raised(Bias())
    arguments = bound_arguments(node)
    assert (arguments["mask"], arguments["slopes"]) == ("full", None)
    assert arguments["bias"] is not None


def test_an_unknown_mask_stays_a_tensor_and_says_so() -> None:
    def checkered(n: int) -> Tensor:
        i, j = grid(n)
        return (j <= i) & ((i - j) % 2 == 0)

    program = traced(Explicit(checkered))
    normalize(program)
    (miss,) = raise_attention(program)
    assert miss.subject == "raise-mask" and "none of the known rules" in miss.reason
    (node,) = program.calls(ATTENTION)
    assert bound_arguments(node)["bias"] is not None
    x = packed(2, 11)
    expected = OneInput(Explicit(checkered), HEADS * WIDTH)(x)
    torch.testing.assert_close(program(x=x)[0], expected)


class WrongAxis(Explicit):
    """Normalises over the queries: not attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bsd."""
        return merge(self.scores(q, k).softmax(-2) @ heads(v))


class Router(nn.Module):
    """A softmax over experts whose weights mix projections: no product of two inputs before it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HEADS * WIDTH, 5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[batch_size, seq, experts] weights applied to an expert axis of v."""
        return self.gate(q).softmax(-1) @ v[:, :5] + k


@pytest.mark.parametrize("module", [WrongAxis(), Router()], ids=["wrong axis", "router"])
def test_other_softmaxes_are_no_candidates(module: nn.Module) -> None:
    program = traced(module)
    normalize(program)
    assert raise_attention(program) == []
    assert program.calls(ATTENTION) == []


class Exotic(Explicit):
    """Something between the product and the softmax that no attention has."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Sines of the scores."""
        return super().scores(q, k).sin()


def test_a_miss_names_the_first_differing_node_and_its_line() -> None:
    program = traced(Exotic())
    normalize(program)
    (miss,) = raise_attention(program)
    assert miss.node.startswith("sin") and miss.source.endswith("in forward")
    assert "attention_modules.py" in miss.source
    assert attention_coverage(program, [miss]).candidates == 1


def test_a_replacement_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison catches a mask that is off by one."""

    class OffByOne(agreement.Agreement):
        def holds(self, region: object, new: fx.Node, inserted: list[fx.Node]) -> bool:
            anchor = next(node for node in inserted if node.target is ATTENTION)
            anchor.kwargs = {**anchor.kwargs, "mask": "sliding_window", "span": 3}
            return super().holds(region, new, inserted)  # pyright: ignore

    monkeypatch.setattr("rewriter.raising.attention.Agreement", OffByOne)
    program = traced(Explicit(causal))
    normalize(program)
    (miss,) = raise_attention(program)
    assert "differ on random inputs" in miss.reason
    assert program.calls(ATTENTION) == []


def test_layers_are_compared_once() -> None:
    """Equal regions share one check and one mask."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Explicit()

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.layer(self.layer(q, k, v), k, v)

    _, nodes = raised(Twice())
    assert len(nodes) == 2
