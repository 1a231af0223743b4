"""What a backend runs gives what the program gives."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from codegen.cpp_kernels import compiler
from rewriter import ConfigError, VerificationError, load, lowering, optimize
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


@needs_compiler
def test_explicit_cpu_says_how_much_is_cpp():
    opt = optimize(small_lm(), backend="cpu")
    assert opt.report.backend == "cpu"
    assert "C++ calls in 1 segment" in opt.report.backend_reason


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_cpu_generates_the_models_tokens(family):
    model, ids = small_lm(family), torch.randint(3, 128, (2, 9))
    opt = optimize(model, backend="cpu", verify=False)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(opt.generate(ids, **options), model.generate(ids, **options))


def test_cpu_needs_a_model_that_decodes():
    with pytest.raises(ConfigError, match="decoding was derived"):
        optimize(Named(), (torch.randn(2, 4),), backend="cpu")


def test_without_a_compiler_references_run_and_the_report_says_so(monkeypatch, tmp_path):
    optimize(small_lm(), backend="cpu", verify=False).save(tmp_path / "saved")
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    with pytest.raises(ConfigError, match="install g\\+\\+"):
        optimize(small_lm(), backend="cpu")
    auto = optimize(small_lm(), verify=False)
    assert auto.report.backend == "eager"
    assert "C++ compiler" in auto.report.backend_reason
    loaded = load(tmp_path / "saved")
    assert loaded.backend == "eager"
    assert any("C++ compiler" in note for note in loaded.report.notes)


@needs_compiler
def test_auto_compiles_for_large_weights(monkeypatch):
    small = optimize(small_lm(), verify=False).report
    assert small.backend == "eager"
    assert "do not pay" in small.backend_reason
    monkeypatch.setattr(lowering, "COMPILE_FROM", 1)
    assert optimize(small_lm(), verify=False).report.backend == "cpu"
