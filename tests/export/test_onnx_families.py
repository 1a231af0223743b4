"""Families that differ in what an attention is: norms, soft-caps, sinks, slopes, experts, other layouts."""

import pytest

from rewriter import optimize
from rewriter.export.onnx_export import export_onnx
from tests.tiny import tiny_causal_lm

SIZES = {
    "hidden_size": 32,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "sliding_window": 6,
}
GROUPED = "com.microsoft::GroupQueryAttention"


@pytest.mark.parametrize(
    ("family", "ep", "operator"),
    [
        ("gemma2", "cpu", GROUPED),
        ("gpt_oss", "portable", "Attention"),
        ("bloom", "cpu", GROUPED),
        ("gpt_neox", "portable", "Attention"),
    ],
)
def test_family(family, ep, operator, tmp_path):
    model = tiny_causal_lm(family, **SIZES)
    optimized = optimize(model, passes="default", verify=False, backend="eager")
    summary = export_onnx(optimized, tmp_path / "model.onnx", ep=ep)
    assert summary.operators[operator] == model.config.num_hidden_layers
    assert summary.agreement["greedy"] == 1.0


def test_a_trained_model_with_narrow_heads(stories260k, tmp_path):
    """Heads of 8: the runtime's operator attends, RotaryEmbedding turns; the embeddings are stored once."""
    optimized = optimize(stories260k, passes="default", verify=False, backend="eager")
    summary = export_onnx(optimized, tmp_path / "model.onnx", ep="cpu", max_length=64)
    layers = optimized.config["num_hidden_layers"]
    assert summary.operators[GROUPED] == layers
    assert summary.operators["RotaryEmbedding"] == 2 * layers
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in optimized.parameters()}
    assert summary.bytes < 1.4 * sum(weights.values()) + 2**19
