from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from rewriter.capture import capture_causal_lm, is_causal_lm
from rewriter.capture.causal_lm import max_positions
from rewriter.errors import CaptureError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def build(config: PreTrainedConfig, attention: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def llama(attention: str = "sdpa") -> torch.nn.Module:
    config = LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
    return build(config, attention)


def mixtral() -> torch.nn.Module:
    return build(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_is_reproduced_at_any_length(attention: str) -> None:
    model = llama(attention)
    program = capture_causal_lm(model)
    assert [spec.name for spec in program.signature.inputs] == ["input_ids", "position_ids"]
    assert [spec.dims for spec in program.signature.inputs] == [("batch", "seq")] * 2
    assert program.baked == ()
    for batch_size, length in ((1, 1), (1, 7), (3, 20)):
        ids = torch.randint(0, 64, (batch_size, length))
        positions = torch.arange(length).expand(batch_size, length)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            assert torch.equal(program(input_ids=ids, position_ids=positions)[0], expected)


def test_meta_describes_the_model() -> None:
    model = llama()
    program = capture_causal_lm(model)
    assert program.meta["kind"] == "causal_lm" and program.meta["max_positions"] == 64
    assert program.meta["config"] is model.config
    assert program.name == "llama"
    assert program.signature.constants == {"use_cache": False}
    assert program.meta["export_seconds"] > 0


def test_training_mode_and_weights_stay() -> None:
    model = llama().train()
    program = capture_causal_lm(model)
    assert all(module.training for module in model.modules())
    assert program.module.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_export_and_their_implementation_stays() -> None:
    model = mixtral()
    before = model.config._experts_implementation
    program = capture_causal_lm(model)
    assert model.config._experts_implementation == before
    ids, positions = torch.randint(0, 64, (2, 9)), torch.arange(9).expand(2, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(program(input_ids=ids, position_ids=positions)[0], expected)
    namespaces = {str(node.target).split(".")[0] for node in program.graph.nodes}
    assert "transformers" not in namespaces


def test_model_without_position_ids() -> None:
    config = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)
    program = capture_causal_lm(build(config, "eager"))
    assert [spec.name for spec in program.signature.inputs] == ["input_ids"]
    assert program.meta["max_positions"] is None


def test_positions_of_its_own_counting_are_kept() -> None:
    config = RobertaConfig(**SIZES, max_position_embeddings=32, is_decoder=True)
    model = build(config)
    torch.nn.init.normal_(model.roberta.embeddings.position_embeddings.weight)
    program = capture_causal_lm(model)
    assert [spec.name for spec in program.signature.inputs] == ["input_ids"]
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(program(input_ids=ids)[0], expected)


def test_unrolled_scan_is_baked_and_says_where() -> None:
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)
    program = capture_causal_lm(build(config, "eager"))
    assert [item.dim for item in program.baked] == [1]
    assert "modeling_mamba.py" in program.baked[0].reason


def test_only_causal_language_models() -> None:
    assert is_causal_lm(llama())
    assert not is_causal_lm(torch.nn.Linear(2, 2))
    bert = BertModel(BertConfig(**SIZES, max_position_embeddings=32))
    assert not is_causal_lm(bert)
    with pytest.raises(CaptureError, match="BertModel is not"):
        capture_causal_lm(bert)


def test_max_positions_reads_any_of_the_usual_fields() -> None:
    assert max_positions(llama()) == 64
