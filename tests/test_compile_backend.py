"""`torch.compile(model, backend="rewriter")`: the same numbers, through operators of the dialect."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from rewriter import compile_backend
from rewriter.compile_backend import rewriter_backend
from tests.small_lms import small_lm
from tests.tiny import TinyConvNet, TinyMLP


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Log(logging.Handler):
    """What the project logged, one message a line."""

    text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


@pytest.fixture
def log():
    handler, logger = Log(), logging.getLogger("rewriter")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def compiled(model, **options):
    return torch.compile(model, backend=rewriter_backend, **options)


def ids(*shape):
    return torch.randint(3, 128, shape)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_causal_lm_is_raised_and_equal(attention, log):
    model = small_lm("llama", attention)
    fast = compiled(model)
    tokens = ids(2, 11)
    torch.testing.assert_close(fast(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert "attention 2/2" in log.text
    assert "2 rewrites" in log.text


def test_a_number_that_changes_is_followed(log):
    fast = torch.compile(lambda x, by: torch.tanh(x) * by, backend=rewriter_backend, dynamic=True)
    x = torch.randn(2, 4)
    for by in (0.5, 0.25, 3.0, 0.5):
        torch.testing.assert_close(fast(x, by), torch.tanh(x) * by)
    assert "as it was traced" not in log.text


def test_other_sizes_run_one_dynamic_program(log):
    model = small_lm()
    fast = compiled(model, dynamic=True)
    for shape in ((2, 11), (3, 13), (4, 29)):
        tokens = ids(*shape)
        torch.testing.assert_close(fast(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert log.text.count("attention 2/2") == 1
    assert "as it was traced" not in log.text


def test_generation_with_the_models_own_cache_is_unchanged(log):
    model, tokens = small_lm(), ids(1, 6)
    expected = model.generate(tokens, max_new_tokens=8, do_sample=False)
    forward = model.forward
    try:
        model.forward = compiled(forward)
        found = model.generate(tokens, max_new_tokens=8, do_sample=False)
    finally:
        model.forward = forward
    assert torch.equal(found, expected)
    assert "as it was traced" not in log.text


@pytest.mark.parametrize("model", [TinyMLP(), TinyConvNet()], ids=["mlp", "cnn"])
def test_plain_modules(model):
    x = torch.randn(3, 5, 16) if isinstance(model, TinyMLP) else torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_marked_dimensions_stay_dynamic():
    model, x = TinyMLP(), torch.randn(4, 5, 16)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    fast = compiled(model)
    torch.testing.assert_close(fast(x), model(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = torch.randn(7, 9, 16)
        torch.testing.assert_close(fast(other), model(other))


def test_what_a_function_does_to_its_inputs_stays():
    def add_one(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x * y

    x = torch.ones(3)
    assert compiled(add_one)(x, torch.full((3,), 2.0)).tolist() == [4, 4, 4]
    assert x.tolist() == [2, 2, 2]


class Layer(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 4), scale))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


def test_equal_layers_compiled_one_by_one_keep_their_own_weights():
    layers = [Layer(0.1), Layer(0.2), Layer(0.3)]
    x = torch.randn(2, 4)
    run = torch.compile(lambda layer, x: layer(x), backend=rewriter_backend)
    for layer in layers:
        torch.testing.assert_close(run(layer, x), layer(x))


def test_weights_changed_in_place_are_seen():
    layer, x = Layer(0.1), torch.randn(2, 4)
    fast = compiled(layer)
    fast(x)
    layer.weight.fill_(0.7)
    torch.testing.assert_close(fast(x), layer(x))


def test_gradients_are_left_to_the_original(log):
    layer, x = Layer(0.1), torch.randn(2, 4)
    with torch.enable_grad():
        compiled(layer)(x).sum().backward()
    assert layer.weight.grad is not None
    assert "gradients are enabled" in log.text


def test_a_wrong_rewrite_is_not_used(log, monkeypatch):
    def break_it(program):
        for node in program.graph.nodes:
            if node.target is torch.ops.aten.tanh.default:
                node.target = torch.ops.aten.sigmoid.default
        program.module.recompile()

    monkeypatch.setattr(compile_backend, "_rewrite", break_it)
    layer, x = Layer(0.1), torch.randn(2, 4)
    torch.testing.assert_close(compiled(layer)(x), layer(x))
    assert "a result differs" in log.text


def test_a_failure_of_ours_is_logged_and_the_graph_still_runs(log, monkeypatch):
    def fail(program):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(compile_backend, "_rewrite", fail)
    layer, x = Layer(0.1), torch.randn(2, 4)
    torch.testing.assert_close(compiled(layer)(x), layer(x))
    assert "RuntimeError: no such thing" in log.text


def test_random_numbers_are_not_consumed():
    layer, x = Layer(0.1), torch.randn(2, 4)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    compiled(layer)(x)
    assert torch.equal(torch.rand(1), expected)


def test_it_is_registered_by_name():
    assert "rewriter" in torch._dynamo.list_backends()
