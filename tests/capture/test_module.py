from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rewriter.capture import capture
from rewriter.errors import CaptureError, ConfigError

from .toys import Classifier, Convolution, Counter, DataDependent, Nested, ShortOnly, Unrolled


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("batch_size, length", [(1, 1), (2, 5), (3, 17)])
def test_other_sizes_than_the_examples(batch_size: int, length: int) -> None:
    model = Classifier().eval()
    program = capture(model, (torch.randn(2, 5, 8),))
    x = torch.randn(batch_size, length, 8)
    logits, mean = program(x=x)
    expected = model(x)
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=0)
    torch.testing.assert_close(mean, expected["mean"], rtol=0, atol=0)


def test_signature_tells_inputs_constants_and_outputs() -> None:
    inputs = {"x": torch.randn(2, 5, 8), "scale": 0.5, "shift": torch.randn(16)}
    signature = capture(Classifier(), inputs).signature
    assert signature.parameters == ("x", "scale", "shift")
    assert [spec.name for spec in signature.inputs] == ["x", "shift"]
    assert signature.inputs[0].dims == ("batch", "seq", 8)
    assert signature.constants == {"scale": 0.5}
    assert signature.leaf_names == ("x", None, "shift")
    assert signature.out_spec.context == ["logits", "mean"]


def test_model_is_not_touched() -> None:
    model = Classifier().train()
    before = snapshot(model)
    program = capture(model, (torch.randn(2, 5, 8),))
    assert model.training and model.dropout.training
    assert "forward" not in vars(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    weights = {id(p) for p in program.module.parameters()}
    assert weights == {id(p) for p in model.parameters()}
    x = torch.randn(1, 4, 8)
    assert torch.equal(program(x=x)[0], model.eval()(x)["logits"])


def test_written_buffers_stay_the_programs_own() -> None:
    model = Counter()
    program = capture(model, (torch.randn(2, 3),))
    assert torch.equal(program(x=torch.zeros(1, 2))[0], torch.ones(1, 2))
    assert model.calls.item() == 0


def test_one_row_is_widened_for_tracing() -> None:
    program = capture(Classifier(), (torch.randn(1, 5, 8),))
    assert program.signature.inputs[0].dims[:2] == ("batch", "seq")


def test_baked_dimensions_are_listed_with_reasons() -> None:
    program = capture(Unrolled(), (torch.randn(2, 5, 8),))
    baked = {(item.input, item.dim): item for item in program.baked}
    assert baked["x", 1].value == 5
    assert "toys.py" in baked["x", 1].reason and "range(x.shape[1])" in baked["x", 1].reason
    assert "neither batch nor sequence" in baked["x", 2].reason
    assert program.signature.inputs[0].dims == ("batch", 5, 8)


def test_images_keep_their_size_and_free_their_batch() -> None:
    model = Convolution().eval()
    program = capture(model, (torch.randn(1, 3, 8, 8),))
    assert program.signature.inputs[0].dims == ("batch", 3, 8, 8)
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(program(image=images)[0], model(images))


def test_decided_branches_are_conditions() -> None:
    program = capture(ShortOnly(), (torch.randn(2, 5),))
    assert program.meta["guards"] == ("x.shape[1] < 16",) or "15" in program.meta["guards"][0]


def test_nested_arguments_are_flattened() -> None:
    pair = (torch.randn(2, 3), torch.randn(2, 3))
    program = capture(Nested(), ({"pair": pair},))
    assert [spec.name for spec in program.signature.inputs] == ["batch_pair_0", "batch_pair_1"]
    total, _ = program(batch_pair_0=pair[0], batch_pair_1=pair[1])
    assert torch.equal(total, pair[0] + pair[1])


def test_error_names_operator_and_source_line() -> None:
    with pytest.raises(CaptureError, match=r"DataDependent cannot be traced") as caught:
        capture(DataDependent(), (torch.randn(2, 3),))
    text = str(caught.value)
    assert "toys.py" in text and "if x.sum() > 0" in text and "aten" in text
    assert "\n" not in text and caught.value.__cause__ is None


@pytest.mark.parametrize(
    "inputs, words",
    [
        (None, "example_inputs"),
        (3, "tuple of positional"),
        ((torch.zeros(1), 2, 3, 4), "forward takes"),
        ({"y": torch.zeros(1)}, "forward takes"),
        ({"x": 3}, "at least one tensor"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        capture(Classifier(), inputs)


def test_graph_is_flat_and_keeps_sources() -> None:
    program = capture(Classifier(), (torch.randn(2, 5, 8),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("assert" in target or "guards" in target for target in targets)
    linear = program.calls(torch.ops.aten.linear.default)[0]
    assert "toys.py" in linear.meta["stack_trace"] and linear.meta["nn_module_stack"]
    assert isinstance(program.graph.output_node().args[0], tuple)
    assert "inner.weight" in program.code
