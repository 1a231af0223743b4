"""Mixtures of experts in the library's two exportable spellings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from rewriter.capture.module import capture
from rewriter.program import Program
from rewriter.raising.moe import raise_moe
from rewriter.raising.normal_form import normalize

EXPERTS, HIDDEN, INNER, CHOSEN = 4, 16, 8, 2
MOE = torch.ops.rewriter.moe.default


class _Experts(nn.Module):
    """What the library's functions expect of an experts module."""

    _is_expert_parallel, has_gate, has_post_expert_norm = False, True, False

    def __init__(self, *, transposed: bool, bias: bool, pairs: bool) -> None:
        super().__init__()
        up, down = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
        if transposed:
            up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
        self.num_experts, self.is_transposed, self.has_bias = EXPERTS, transposed, bias
        self.pairs = pairs
        self.gate_up_proj = nn.Parameter(torch.randn(up) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(down) * 0.3)
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
            self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def _apply_gate(self, x: Tensor) -> Tensor:
        if not self.pairs:
            gate, up = x.chunk(2, dim=-1)
            return functional.silu(gate) * up
        gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)


class _Layer(nn.Module):
    def __init__(self, run: str, **options: bool) -> None:
        super().__init__()
        self.run = grouped_mm_experts_forward if run == "grouped" else batched_mm_experts_forward
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = _Experts(**options)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weight, index = self.router(tokens).softmax(-1).topk(CHOSEN)
        return self.run(self.experts, tokens, index, weight).view(x.shape)


class _All(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                _Layer("grouped", transposed=False, bias=False, pairs=False),
                _Layer("grouped", transposed=True, bias=True, pairs=True),
                _Layer("batched", transposed=False, bias=True, pairs=False),
                _Layer("batched", transposed=True, bias=False, pairs=True),
            ]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


@pytest.fixture(scope="module")
def raised() -> tuple[Program, nn.Module]:
    model = _All().eval()
    program = capture(model, {"x": torch.randn(2, 5, HIDDEN)})
    normalize(program)
    assert raise_moe(program) == []
    return program, model


def test_every_spelling_is_raised(raised: tuple[Program, nn.Module]) -> None:
    calls = raised[0].calls(MOE)
    assert [c.kwargs["gating"] for c in calls] == ["halves", "pairs", "halves", "pairs"]
    assert [c.kwargs["transposed"] for c in calls] == [False, True, False, True]
    assert [c.kwargs.get("limit", 0.0) for c in calls] == [0.0, 7.0, 0.0, 7.0]


@pytest.mark.parametrize("seq", [1, 9])
def test_outputs_stay(raised: tuple[Program, nn.Module], seq: int) -> None:
    program, model = raised
    x = torch.randn(3, seq, HIDDEN)
    with torch.no_grad():
        torch.testing.assert_close(program(x=x), model(x), rtol=1e-5, atol=1e-5)


def test_unknown_mixture_is_a_miss() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x.view(1, -1, HIDDEN).expand(EXPERTS, -1, -1), self.weight).sum(0)

    program = capture(Dense(), {"x": torch.randn(2, 5, HIDDEN)})
    normalize(program)
    (miss,) = raise_moe(program)
    assert miss.subject == "raise-moe" and "stacked expert weights" in miss.reason
