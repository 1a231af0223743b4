"""The zoo: Hugging Face decoder families as tiny random models, for `coverage.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["DECODERS", "Family", "NoSuchSpelling", "build", "randomize"]


class NoSuchSpelling(Exception):
    """The model has no such attention implementation."""


_SIZES: dict[str, Any] = {
    # names differ between configurations: each takes the ones it knows
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "n_inner": 128,
    "dff": 128,
    "decoder_ffn_dim": 128,
    "encoder_ffn_dim": 128,
    "ffn_hidden_size": 128,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "query_pre_attn_scalar": 16,
    "rotary_dim": 8,
    "vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "n_ctx": 128,
    "sliding_window": 8,
    "attention_window_size": 8,
    "window_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Lists with an entry per layer: left to the configuration, which builds them for two layers."""


@dataclass(frozen=True)
class Family:
    """One decoder family.

    Attributes:
        model_type: the Hugging Face name.
        overrides: configuration fields that differ from the common sizes; None = leave the default.
        mixes: the operator beside causal attention that makes decoding a Miss; "" = derivable.
    """

    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    mixes: str = ""


def _f(model_type: str, mixes: str = "", **overrides: Any) -> Family:
    return Family(model_type, overrides, mixes)


_NEO_LAYERS = [[["global", "local"], 1]]
_LONG = {"rope_theta": 1e4, "rope_type": "default"}

DECODERS: tuple[Family, ...] = (
    _f("llama"),
    _f("mistral"),
    _f("mixtral"),
    _f("qwen2"),
    _f("qwen2_moe"),
    _f("qwen3"),
    _f("qwen3_moe"),
    _f("gemma"),
    _f("gemma2"),
    _f("gemma3_text"),
    _f("phi"),
    _f("phi3"),
    _f("phimoe"),
    _f("opt"),
    _f("gpt2"),
    _f("gpt_neo", attention_types=_NEO_LAYERS),
    _f("gpt_neox"),
    _f("gpt_neox_japanese"),
    _f("gptj"),
    _f("codegen"),
    _f("gpt_bigcode"),
    _f("bloom"),
    _f("mpt"),
    _f("falcon"),
    _f("stablelm"),
    _f("starcoder2"),
    _f("olmo"),
    _f("olmo2"),
    _f("olmo3"),
    _f("olmoe"),
    _f("flex_olmo"),
    _f("cohere"),
    _f("cohere2"),
    _f("granite"),
    _f("granitemoe"),
    _f("granitemoeshared", shared_intermediate_size=64),
    _f("smollm3"),
    _f("persimmon"),
    _f("deepseek_v2", num_key_value_heads=4),
    _f("deepseek_v3", num_key_value_heads=4, head_dim=8),
    _f("gpt_oss"),
    _f("glm"),
    _f("glm4"),
    _f("glm4_moe"),
    _f("nemotron"),
    _f("helium"),
    _f("ernie4_5"),
    _f("ernie4_5_moe"),
    _f("exaone4"),
    _f("hunyuan_v1_dense"),
    _f("hunyuan_v1_moe"),
    _f("arcee"),
    _f("bitnet"),
    _f("apertus"),
    _f("seed_oss"),
    _f("dots1", n_shared_experts=1),
    _f("xglm"),
    _f("biogpt"),
    _f("ctrl"),
    _f("openai-gpt"),
    _f("diffllama"),
    _f("jetmoe"),
    _f("llama4_text"),
    _f("minimax"),
    _f("doge"),
    _f("ministral"),
    _f("modernbert-decoder"),
    _f("vaultgemma"),
    _f("cwm"),
    _f("nanochat"),
    _f("afmoe"),
    _f("minimax_m2"),
    _f("jais2"),
    _f("bart"),
    _f("trocr"),
    _f("blenderbot"),
    _f("pegasus"),
    _f("mellum"),
    _f("internlm3"),
    _f("minicpm3", num_key_value_heads=4),
    _f("iquestcoder"),
    _f("exaone_moe"),
    _f("solar_open"),
    _f("hy_v3"),
    _f("laguna"),
    _f("flint"),
    _f("kolibri1"),
    _f("granite_swa"),
    _f("granitemoe_swa"),
    _f("mimo_v2_flash"),
    _f("ministral3"),
    _f("cohere2_moe"),
    _f("aria_text"),
    _f("youtu", num_key_value_heads=4, head_dim=8),
    _f("axk1", num_key_value_heads=4, head_dim=8),
    _f("glm4_moe_lite", num_key_value_heads=4, head_dim=8),
    _f("roberta"),
    _f("bert-generation"),
    _f("roformer"),
    _f("xlm-roberta"),
    _f("camembert"),
    _f("megatron-bert"),
    _f("electra"),
    _f("mvp"),
    _f("plbart"),
    _f("marian"),
    _f("mbart"),
    _f("blenderbot-small"),
    _f("bigbird_pegasus"),
    _f("mamba", mixes="convolution and scan", intermediate_size=128),
    _f("mamba2", mixes="convolution and scan", num_heads=4, head_dim=32, n_groups=1),
    _f("rwkv", mixes="token shift"),
    _f("recurrent_gemma", mixes="convolution and recurrence"),
    _f("lfm2", mixes="convolution", layer_types=["conv", "full_attention"]),
    _f(
        "zamba2",
        mixes="convolution and scan",
        layers_block_type=["linear_attention", "hybrid"],
        mamba_headdim=16,
        kv_channels=16,
    ),
)


def build(family: Family, attention: str) -> nn.Module:
    """A two-layer random model of a family, in eval mode.

    Args:
        attention: "sdpa" or "eager".
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config_class = type(AutoConfig.for_model(family.model_type))
    fields = {key: value for key, value in _sizes(config_class()).items() if value is not None}
    fields |= {key: value for key, value in family.overrides.items() if value is not None}
    config = config_class(**fields)
    config.is_decoder, config.is_encoder_decoder = True, False
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    except ValueError as error:
        if "does not support an attention implementation" in str(error):
            raise NoSuchSpelling(f"the model has no {attention} attention") from None
        raise
    randomize(model)
    return model


def _sizes(default: Any) -> dict[str, Any]:
    """The common sizes that a configuration knows; windows only where the default has one."""
    names = getattr(type(default), "attribute_map", {})
    known = {
        key: value
        for key, value in _SIZES.items()
        if hasattr(default, key) and key not in names and not _is_computed(default, key)
    }
    if getattr(default, "sliding_window", None) is None:
        known.pop("sliding_window", None)
    return known


def _is_computed(default: Any, key: str) -> bool:
    """Whether a field is a property of the configuration, computed from others."""
    return isinstance(getattr(type(default), key, None), property)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random weights that make every part matter: no zero bias, no unit norm, varied tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.nan_to_num_().add_(0.1 * noise)
