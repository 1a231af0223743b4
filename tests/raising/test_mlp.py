"""Feed-forward blocks in every spelling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.capture.module import capture
from rewriter.program import Program
from rewriter.raising.mlp import raise_mlp
from rewriter.raising.normal_form import normalize

HIDDEN, INNER = 6, 10
MLP, GATED = torch.ops.rewriter.mlp.default, torch.ops.rewriter.gated_mlp.default


class _Block(nn.Module):
    def __init__(self, ups: int = 1, width: int = INNER, bias: bool = True) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(HIDDEN, width, bias=bias) for _ in range(ups))
        self.down = nn.Linear(INNER, HIDDEN, bias=bias)

    def between(self, *outputs: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(*(up(x) for up in self.ups)))


class Llama(_Block):
    def __init__(self) -> None:
        super().__init__(ups=2, bias=False)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        return functional.silu(first) * second


class UpFirst(_Block):
    def __init__(self) -> None:
        super().__init__(ups=2)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        return first * (second * torch.sigmoid(second))


class Fused(_Block):
    def __init__(self) -> None:
        super().__init__(width=2 * INNER)

    def between(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return up * functional.gelu(gate)


class FusedUpFirst(Fused):
    def between(self, both: Tensor) -> Tensor:
        return both[..., :INNER] * functional.gelu(both[..., INNER:])


class FusedPairs(Fused):
    def between(self, both: Tensor) -> Tensor:
        return functional.relu(both[..., ::2]) * both[..., 1::2]


class ExplicitGelu(_Block):
    def between(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class SquaredRelu(_Block):
    def between(self, x: Tensor) -> Tensor:
        return torch.pow(functional.relu(x), 2)


class QuickGelu(_Block):
    def between(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Conv1D(nn.Module):
    """GPT-2's: weights [in, out], called on a matrix of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(INNER, HIDDEN), nn.Linear(HIDDEN, INNER)
        self.up_bias, self.down_bias = (nn.Parameter(torch.randn(n)) for n in (INNER, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.addmm(self.up_bias, x.view(-1, HIDDEN), self.up.weight)
        inner = functional.relu(inner.view(*x.shape[:-1], INNER))
        out = torch.addmm(self.down_bias, inner.view(-1, INNER), self.down.weight)
        return out.view(x.shape)


class _Unknown(_Block):
    def between(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x * 1.5 + x * x, torch.expm1(x))


class _Reused(_Block):
    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.ups[0](x))
        return self.down(inner) + inner.sum(-1, keepdim=True)


class _AttentionLike(_Block):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.ups[0](x) @ self.ups[0](x).transpose(-1, -2)
        return self.down(scores.softmax(-1) @ self.ups[0](x))


class _All(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(block(x) for block in self.blocks)


EXPECTED = {
    Llama: (GATED, "silu"),
    UpFirst: (GATED, "silu"),
    Fused: (GATED, "gelu"),
    FusedUpFirst: (GATED, "gelu"),
    FusedPairs: (GATED, "relu"),
    ExplicitGelu: (MLP, "gelu_tanh"),
    SquaredRelu: (MLP, "relu_squared"),
    QuickGelu: (MLP, "quick_gelu"),
    Conv1D: (MLP, "relu"),
}


def _program(*blocks: nn.Module) -> tuple[Program, nn.Module]:
    model = _All(list(blocks)).eval()
    program = capture(model, {"x": torch.randn(2, 5, HIDDEN)})
    normalize(program)
    return program, model


@pytest.fixture(scope="module")
def raised() -> tuple[Program, nn.Module]:
    program, model = _program(*(block() for block in EXPECTED))
    assert raise_mlp(program) == []
    return program, model


@pytest.mark.parametrize("block", EXPECTED)
def test_spelling_is_raised(raised: tuple[Program, nn.Module], block: type[nn.Module]) -> None:
    (outputs,) = raised[0].graph.output_node().args
    node = outputs[list(EXPECTED).index(block)]
    node = node if node.target in (MLP, GATED) else node.args[0]
    assert (node.target, node.kwargs["activation"]) == EXPECTED[block]


def test_outputs_stay(raised: tuple[Program, nn.Module]) -> None:
    program, model = raised
    for seq in (1, 7):
        x = torch.randn(3, seq, HIDDEN)
        with torch.no_grad():
            torch.testing.assert_close(program(x=x), model(x=x), rtol=1e-5, atol=1e-5)


def test_weights_are_not_copied(raised: tuple[Program, nn.Module]) -> None:
    program, model = raised
    owned = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in program.module.parameters()} <= owned


def test_what_is_not_raised_says_why() -> None:
    program, _ = _program(_Unknown(), _Reused(), _AttentionLike())
    unknown, reused = raise_mlp(program)
    assert "no known activation" in unknown.reason and "expm1" in unknown.reason
    assert "also used outside" in reused.reason
    assert not program.calls(MLP)
