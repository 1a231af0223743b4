"""Norms in every spelling, in fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from rewriter.capture.module import capture
from rewriter.program import Program
from rewriter.raising.norm import raise_norm
from rewriter.raising.normal_form import normalize

WIDTH = 16
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


def _scaled(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def llama(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight * _scaled(x).to(x.dtype)


def gemma(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (_scaled(x) * (1.0 + weight.float())).to(x.dtype)


def olmo(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (weight * _scaled(x)).to(x.dtype)


def weightless(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _scaled(x).to(x.dtype)


def by_power(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * (wide * wide).mean(-1, keepdim=True).add(1e-6).pow(-0.5)).to(x.dtype)


def by_division(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def library(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (WIDTH,), weight, 1e-6)


def moments(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (out * weight.float() + bias.float()).to(x.dtype)


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (WIDTH,), weight, bias, 1e-5)


RMS = [llama, gemma, olmo, weightless, by_power, by_division, library]
LAYER = [moments, layer]
BITWISE = (llama, gemma, olmo, weightless, layer)


class _Norms(nn.Module):
    """Several formulas on one x, because tracing is what takes time."""

    def __init__(self, formulas: Sequence[Formula], dtype: torch.dtype) -> None:
        super().__init__()
        self.formulas = formulas
        self.weight = nn.Parameter(torch.randn(WIDTH).to(dtype))
        self.bias = nn.Parameter(torch.randn(WIDTH).to(dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(formula(x, self.weight, self.bias) for formula in self.formulas)


def _program(*formulas: Formula, dtype: torch.dtype = torch.float32) -> tuple[Program, nn.Module]:
    model = _Norms(formulas, dtype)
    program = capture(model, {"x": torch.randn(2, 5, WIDTH).to(dtype)})
    normalize(program)
    return program, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings_are_raised(dtype: torch.dtype) -> None:
    program, model = _program(*RMS, *LAYER, dtype=dtype)
    assert raise_norm(program) == []
    (outputs,) = program.graph.output_node().args
    x = torch.randn(3, 7, WIDTH).to(dtype)
    with torch.no_grad():
        expected = model(x=x)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for i, formula in enumerate((*RMS, *LAYER)):
        op = torch.ops.rewriter.layer_norm if formula in LAYER else torch.ops.rewriter.rms_norm
        assert outputs[i].target is op.default, formula
        assert all(n.op != "call_function" for n in outputs[i].all_input_nodes), formula
        torch.testing.assert_close(program(x=x)[i], expected[i], rtol=tolerance, atol=tolerance)
        if dtype == torch.bfloat16 and formula in BITWISE:
            assert torch.equal(program(x=x)[i], expected[i]), formula


def test_length_normalisation_is_left_alone() -> None:
    def unit(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    program, _ = _program(unit)
    assert raise_norm(program) == []
    assert not program.calls(torch.ops.rewriter.rms_norm.default)


def test_norm_over_another_dimension_is_a_miss() -> None:
    def over_tokens(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)

    program, _ = _program(over_tokens)
    (miss,) = raise_norm(program)
    assert miss.subject == "raise-norm"
    assert "in forward" in miss.source


def test_weights_of_one_are_not_taken_for_none() -> None:
    program, model = _program(llama)
    with torch.no_grad():
        model.weight.fill_(1.0)
    raise_norm(program)
    (node,) = program.calls(torch.ops.rewriter.rms_norm.default)
    assert len(node.args) == 2


def test_value_used_before_the_weight_keeps_its_meaning() -> None:
    def shared(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        scaled = _scaled(x)
        return torch.cat((weight * scaled, scaled), dim=-1)

    program, model = _program(shared)
    raise_norm(program)
    x = torch.randn(3, 7, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(program(x=x)[0], model(x=x)[0])
