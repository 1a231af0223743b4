"""What models take and return survives saving, by structure and by type."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from rewriter import ArtifactError, load, optimize
from rewriter.export.tree_json import Record, tree_from_json, tree_to_json
from tests.tiny import token_ids

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Foreign(ModelOutput):
    score: Tensor | None = None
    rest: Tensor | None = None


VALUES = [
    1,
    (),
    (1, [2, {"a": 3, "b": (4,)}]),
    CausalLMOutputWithPast(logits=torch.ones(1)),
    BaseModelOutput(last_hidden_state=torch.ones(1), hidden_states=(torch.ones(1), torch.ones(1))),
    Foreign(score=torch.ones(1)),
    Pair(1, (2, 3)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_round_trip(value):
    leaves, spec = pytree.tree_flatten(value)
    again = tree_from_json(tree_to_json(spec))
    assert again == spec
    assert type(pytree.tree_unflatten(leaves, again)) is type(value)


def test_a_class_of_another_process_becomes_a_record():
    spec = pytree.tree_structure(Foreign(score=torch.ones(1)))
    stored = tree_to_json(spec) | {"class": "elsewhere.Foreign"}
    value = pytree.tree_unflatten([torch.ones(2)], tree_from_json(stored))
    assert isinstance(value, Record)
    assert value.score is value["score"]
    with pytest.raises(AttributeError, match="rest"):
        _ = value.rest


@pytest.mark.parametrize(
    "name", ["os.path", "transformers.pipelines.Pipeline", "subprocess.Popen", ""]
)
def test_no_other_class_is_imported(name):
    stored = {"fields": [None], "names": ["a"], "absent": [], "class": name}
    assert tree_from_json(stored).type is Record


@pytest.mark.parametrize(
    "stored", [3, "x", {}, {"tuple": 3}, {"dict": [None], "keys": []}, {"a": []}]
)
def test_other_json_is_refused(stored):
    with pytest.raises(ArtifactError, match="unknown structure"):
        tree_from_json(stored)


class Structured(nn.Module):
    """Returns a transformers output, takes a dict, and shares one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(3))

    def forward(self, inputs: dict[str, Tensor]) -> BaseModelOutput:
        hidden = self.second(self.first(inputs["x"])) + inputs["y"] + self.table.sum()
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden, hidden + 1))


@pytest.fixture(scope="module")
def structured(tmp_path_factory):
    inputs = {"x": torch.randn(2, 4), "y": torch.randn(2, 4)}
    optimized = optimize(Structured(), (inputs,))
    directory = tmp_path_factory.mktemp("structures") / "saved"
    optimized.save(directory)
    return optimized, directory


def test_a_nested_signature_works_after_loading(structured):
    optimized, directory = structured
    inputs = {"x": torch.randn(5, 4), "y": torch.randn(5, 4)}
    found, expected = load(directory)(inputs), optimized(inputs)
    assert type(found) is BaseModelOutput
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.hidden_states[1], expected.hidden_states[1])


def test_a_shared_weight_is_stored_once(structured):
    from safetensors import safe_open

    _, directory = structured
    with safe_open(directory / "weights.safetensors", "pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    assert shapes.count((4, 4)) == 1
    loaded = load(directory)
    matrices = {p.data_ptr() for p in loaded.parameters() if p.dim() == 2}
    assert len(matrices) == 1


def test_a_language_model_keeps_its_output_type(tmp_path):
    from tests.small_lms import small_lm

    optimized = optimize(small_lm(), verify=False)
    optimized.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    ids = token_ids(2, 7)
    assert type(loaded(ids)) is type(optimized(ids)) is CausalLMOutputWithPast
    assert loaded.config == optimized.config or loaded.config["model_type"] == "llama"
    assert loaded.program.decoding == optimized.program.decoding
    assert loaded.program.signature == optimized.program.signature
    sources = [line for _, line in optimized.program.source_lines()]
    assert [line for _, line in loaded.program.source_lines()] == sources
