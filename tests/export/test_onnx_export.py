"""Programs as ONNX files: what is in them, equal to the program, refused and undone when they are not."""

import json

import numpy as np
import onnx
import pytest
import torch

from rewriter import ConfigError, VerificationError, optimize
from rewriter.export import onnx_check
from rewriter.export.onnx_check import Decoder, open_session
from rewriter.export.onnx_export import export_onnx
from rewriter.export.onnx_file import open_onnx
from tests.tiny import TinyConvNet, tiny_causal_lm

STREAMING = "streaming-llm{num_sink_tokens=2,recent_window=6}"
SIZES = {"hidden_size": 64, "head_dim": 16, "max_position_embeddings": 64, "num_hidden_layers": 2}
GROUPED = "com.microsoft::GroupQueryAttention"


def exported(directory, family="llama", passes="default", changes=(), **options):
    model = tiny_causal_lm(family, **SIZES | dict(changes))
    optimized = optimize(model, passes=passes, verify=False, backend="eager")
    path = directory / "model.onnx"
    return export_onnx(optimized, path, **options), optimized


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("portable"))


def test_every_layer_is_one_attention_of_the_standard(portable):
    summary, _ = portable
    model = onnx.load(summary.path, load_external_data=False)
    assert summary.operators["Attention"] == 2
    assert {node.domain for node in model.graph.node} == {""}
    assert summary.agreement["greedy"] == 1.0
    assert not summary.decomposed


def test_the_file_says_what_it_is(portable):
    summary, optimized = portable
    file = open_onnx(summary.path)
    metadata = file.metadata
    assert metadata["kind"] == "causal_lm" and metadata["padding"] == "any"
    assert metadata["operators"] == summary.operators
    assert [port["name"] for port in metadata["inputs"]][:3] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
    ]
    assert metadata["states"][0]["dims"] == ["batch", 2, "past", 16]
    assert metadata["data"]["file"] == "model.onnx.data"
    assert metadata["max_positions"] == 64
    assert "/" not in json.dumps([metadata["name"], metadata["versions"]])
    model = onnx.load(summary.path, load_external_data=False)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    size = sum(p.numel() * p.element_size() for p in optimized.parameters())
    assert metadata["data"]["bytes"] < 1.2 * size + 4096 * 40


def test_names_and_dimensions_are_those_of_the_metadata(portable):
    summary, _ = portable
    session = open_session(summary.path)
    metadata = open_onnx(summary.path).metadata
    for values, ports in (
        (session.get_inputs(), metadata["inputs"]),
        (session.get_outputs(), metadata["outputs"]),
    ):
        assert [(v.name, v.shape) for v in values] == [(p["name"], p["dims"]) for p in ports]


def test_rows_of_other_padding_do_not_change_a_row(portable):
    summary, _ = portable
    metadata = open_onnx(summary.path).metadata
    session = open_session(summary.path)
    ids = np.array([[5, 9, 11, 3]], np.int64)
    ones = np.ones_like(ids)
    alone = Decoder(session, metadata["states"], 1).run(ids, ones, ids)
    both, mask = np.repeat(ids, 2, 0), np.repeat(ones, 2, 0)
    mask[1, :3] = 0
    together = Decoder(session, metadata["states"], 2).run(both, mask, both)
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_the_check_notices_another_function(tmp_path, monkeypatch):
    real = onnx_check.lower

    def off(program, backend):
        run = real(program, backend)
        return lambda *values: [out * 1.001 for out in run(*values)]

    monkeypatch.setattr(onnx_check, "lower", off)
    with pytest.raises(VerificationError, match="relative error"):
        exported(tmp_path, changes={"num_hidden_layers": 1})
    assert not list(tmp_path.iterdir())


def test_group_query_attention_of_the_runtime(tmp_path):
    summary, _ = exported(tmp_path, "mistral", ep="cpu", changes={"sliding_window": 6})
    assert summary.operators[GROUPED] == 2
    assert summary.operators["com.microsoft::SkipSimplifiedLayerNormalization"] == 4
    assert summary.operators["MatMul"] == 11  # q, k and v are one
    assert open_onnx(summary.path).metadata["padding"] == "right"


def test_bounded_state_has_a_fixed_size(tmp_path):
    one = {"num_hidden_layers": 1}
    summary, _ = exported(tmp_path, passes=STREAMING, logits="all", changes=one)
    metadata = open_onnx(summary.path).metadata
    assert metadata["states"][0]["dims"] == ["batch", 2, 9, 16]
    assert metadata["states"][-1]["dims"] == ["batch", 9]
    assert metadata["states"][-1]["fill"] == -1 and metadata["max_chunk"] == 6
    assert "streaming_attention" in summary.decomposed
    assert [p["name"] for p in metadata["inputs"]][:2] == ["input_ids", "position_ids"]


def test_a_plain_module(tmp_path):
    optimized = optimize(TinyConvNet(), {"images": torch.randn(2, 3, 8, 8)}, verify=False)
    summary = export_onnx(optimized, tmp_path / "net.onnx")
    assert open_onnx(summary.path).metadata["kind"] == "module"
    assert summary.operators["Conv"] == 2


@pytest.mark.parametrize("option", [{"ep": "tpu"}, {"logits": "some"}, {"max_length": 0}])
def test_options_are_checked_first(option, portable, tmp_path):
    _, optimized = portable
    with pytest.raises(ConfigError, match=next(iter(option))):
        export_onnx(optimized, tmp_path / "model.onnx", **option)
