"""References against independent formulas, written another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rewriter.dialect import gated_mlp, layer_norm, linear, mlp, moe, rms_norm, rope
from rewriter.dialect.mlp import ACTIVATIONS


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_complex_product(interleaved: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 12), torch.randn(2, 1, 5, 4)
    y = rope.reference(x, angle.cos(), angle.sin(), interleaved=interleaved)
    for i in range(4):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
        turned = torch.complex(x[..., first], x[..., second]) * torch.exp(1j * angle[..., i])
        _close(y[..., first], turned.real)
        _close(y[..., second], turned.imag)
    assert torch.equal(y[..., 8:], x[..., 8:])


def test_rms_norm_against_torch() -> None:
    x, weight = torch.randn(3, 4, 16), torch.randn(16)
    expected = functional.rms_norm(x, (16,), weight, eps=1e-5)
    _close(rms_norm.reference(x, weight, eps=1e-5), expected)
    offset = functional.rms_norm(x, (16,), weight + 1, eps=1e-5)
    _close(rms_norm.reference(x, weight, eps=1e-5, weight_offset=1.0), offset)


def test_layer_norm_from_its_moments() -> None:
    x, weight, bias = torch.randn(3, 4, 16), torch.randn(16), torch.randn(16)
    deviation = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (x - x.mean(-1, keepdim=True)) / deviation * weight + bias
    _close(layer_norm.reference(x, weight, bias, eps=1e-5), expected)


FORMULAS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(0.7978845608 * (v + 0.044715 * v**3))),
    "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
    "relu": lambda v: max(v, 0.0),
    "relu_squared": lambda v: max(v, 0.0) ** 2,
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "tanh": math.tanh,
    "identity": lambda v: v,
}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation(name: str) -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[name](float(v)) for v in x], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), expected, rtol=1e-8, atol=1e-8)


def test_mlps_by_matrix_products() -> None:
    x, up, gate, down = (torch.randn(*s) for s in ((5, 8), (12, 8), (12, 8), (8, 12)))
    up_bias, down_bias = torch.randn(12), torch.randn(8)
    expected = (x @ up.T + up_bias).clamp_min(0) @ down.T + down_bias
    _close(mlp.reference(x, up, down, up_bias, down_bias, activation="relu"), expected)
    expected = ((x @ gate.T).clamp_min(0) * (x @ up.T)) @ down.T
    _close(gated_mlp.reference(x, gate, up, down, activation="relu"), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gating", ["none", "halves", "pairs"])
def test_moe_token_by_token(gating: str, transposed: bool) -> None:
    experts, hidden, inner, tokens = 4, 6, 5, 7
    wide = inner if gating == "none" else 2 * inner
    up, down = torch.randn(experts, wide, hidden), torch.randn(experts, hidden, inner)
    up_bias, down_bias = torch.randn(experts, wide), torch.randn(experts, hidden)
    x, weight = torch.randn(tokens, hidden), torch.rand(tokens, 2)
    index = torch.rand(tokens, experts).topk(2).indices
    expected = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for slot in range(2):
            e = int(index[token, slot])
            u = up[e] @ x[token] + up_bias[e]
            parts = {"none": (u, 1), "halves": (u[:inner], u[inner:]), "pairs": (u[::2], u[1::2])}
            first, second = parts[gating]
            out = down[e] @ (first.clamp_min(0) * second) + down_bias[e]
            expected[token] += weight[token, slot] * out
    if transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    actual = moe.reference(
        x, index, weight, up, down, up_bias, down_bias,
        activation="relu", gating=gating, transposed=transposed,
    )  # fmt: skip
    _close(actual, expected)


def test_moe_runs_chosen_experts_only() -> None:
    up, down = torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    up[2] = math.nan
    index, weight = torch.tensor([[0], [1]]), torch.ones(2, 1)
    x = torch.randn(2, 4)
    out = moe.reference(x, index, weight, up, down, activation="relu", gating="none")
    assert out.isfinite().all()


@pytest.mark.parametrize("rows", [1, 7, 63, 65])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_large_products_against_double_precision(
    rows: int, bias: bool, dtype: torch.dtype, allowed: float
) -> None:
    weight = torch.randn(1031, 513).to(dtype)
    x, shift = torch.randn(rows, 513).to(dtype), torch.randn(1031).to(dtype) if bias else None
    expected = x.double() @ weight.double().T + (0.0 if shift is None else shift.double())
    for given in (x, x.unsqueeze(0), x.T.contiguous().T):
        actual = linear(given, weight, shift)
        error = (actual.double().view_as(expected) - expected).abs().max() / expected.abs().max()
        assert error < allowed
