from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rewriter.capture import capture, load_model
from rewriter.capture.exported import ExportedModule
from rewriter.errors import ModelError

from .toys import Classifier

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def copy_of(saved: Path, target: Path) -> Path:
    for file in saved.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_directory(saved: Path) -> None:
    model = load_model(saved)
    assert isinstance(model, LlamaForCausalLM) and not model.training


def test_headless_architecture(saved: Path, tmp_path: Path) -> None:
    directory = copy_of(saved, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["LlamaModel"]
    (directory / "config.json").write_text(json.dumps(config))
    assert type(load_model(str(directory))).__name__ == "LlamaModel"


def test_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_broken_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_model(tmp_path)


def test_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelError, match="no_such_model"):
        load_model(tmp_path)


def test_missing_weights(saved: Path, tmp_path: Path) -> None:
    directory = copy_of(saved, tmp_path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_model(directory)


@pytest.mark.parametrize("keep", [0, 20, 2000])
def test_truncated_weights(saved: Path, tmp_path: Path, keep: int) -> None:
    directory = copy_of(saved, tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="cannot load") as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)


def test_weights_of_fewer_layers_are_not_filled_in(saved: Path, tmp_path: Path) -> None:
    directory = copy_of(saved, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": None}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"missing keys.*layers\.1"):
        load_model(directory)


@pytest.mark.parametrize("text", ["no/such/place", "nothing", "a b:c", "model.bin"])
def test_text_that_names_nothing(text: str) -> None:
    with pytest.raises(ModelError, match=r"does not exist.*package\.module:factory"):
        load_model(text)


class TestFactory:
    @pytest.fixture(autouse=True)
    def working_directory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(HERE)

    def test_module(self) -> None:
        assert not load_model("toys:make_plain").training

    def test_example_inputs_travel_along(self) -> None:
        program = capture(load_model("toys:make_classifier"))
        assert [spec.name for spec in program.signature.inputs] == ["x"]

    @pytest.mark.parametrize(
        "text, words",
        [
            ("no_such_module:make", "cannot import 'no_such_module'"),
            ("toys:missing", "no callable 'missing'"),
            ("toys:make_nothing", "returned int"),
            ("toys:make_failing", "RuntimeError: no weights$"),
        ],
    )
    def test_failures(self, text: str, words: str) -> None:
        with pytest.raises(ModelError, match=words):
            load_model(text)


class TestExported:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "model.pt2"
        dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        exported = torch.export.export(
            Classifier().eval(), (torch.randn(2, 5, 8), 0.5), dynamic_shapes=(dims, None)
        )
        torch.export.save(exported, path)
        return path

    def test_is_captured_as_it_is(self, file: Path) -> None:
        model = load_model(file)
        assert isinstance(model, ExportedModule)
        program = capture(model)
        assert program.signature.inputs[0].dims == ("batch", "seq", 8)
        x = torch.randn(3, 7, 8)
        expected = model(x, 0.5)["logits"]
        assert torch.equal(program(**{program.signature.inputs[0].name: x})[0], expected)

    def test_damaged(self, file: Path) -> None:
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ModelError, match=r"not a program of torch\.export"):
            load_model(file)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="does not exist"):
            load_model(tmp_path / "model.pt2")
