"""What a backend runs gives what the program gives."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from rewriter import VerificationError, optimize
from rewriter import optimized as optimized_module
from rewriter.lowering import lower
from tests.small_lms import small_lm

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler",
)


class Named(nn.Module):
    """Weights whose paths are no names, or those of inputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.register_buffer("x", torch.randn(4))

    def forward(self, x):
        return self.layers(x) + self.x


def test_weights_take_no_name_of_an_input():
    module, x = Named(), torch.randn(2, 4)
    torch.testing.assert_close(optimize(module, (x,))(x), module(x))


def test_the_program_stays_as_it_is():
    program = optimize(small_lm(), verify=False).program
    before = program.code
    lower(program, "eager")
    assert program.code == before


def test_weights_changed_in_place_are_seen():
    module, x = Named(), torch.randn(2, 4)
    opt = optimize(module, (x,))
    module.layers[0].weight.fill_(0.5)
    torch.testing.assert_close(opt(x), module(x))


@needs_compiler
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_inductor_generates_the_models_tokens(family):
    model, ids = small_lm(family), torch.randint(3, 128, (2, 9))
    opt = optimize(model, backend="inductor", verify=False)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(opt.generate(ids, **options), model.generate(ids, **options))


def test_a_backend_that_computes_something_else_is_not_shipped(monkeypatch):
    def doubled(program, backend):
        right = lower(program, backend)
        return lambda *inputs: [2 * output for output in right(*inputs)]

    monkeypatch.setattr(optimized_module, "lower", doubled)
    with pytest.raises(VerificationError, match="backend eager fails on"):
        optimize(Named(), (torch.randn(2, 4),))
