"""Models small enough for every test: random weights, fixed by a seed, with spread-out logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TINY_CONFIG", "TinyConvNet", "TinyMLP", "tiny_causal_lm", "tiny_llama", "token_ids"]

TINY_CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""What `tiny_causal_lm` starts from; each family takes the names it knows."""


def tiny_causal_lm(family: str, *, attention: str = "eager", seed: int = 0, **changes: Any) -> Any:
    """A Hugging Face causal LM of a family, e.g. "llama", "qwen3", "gemma2".

    Args:
        family: the `model_type` of its configuration.
        attention: "eager" or "sdpa".
        seed: of the weights, which have a deviation of 0.2: wide enough to tell positions apart.
        changes: configuration values instead of `TINY_CONFIG`'s.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**TINY_CONFIG, **changes})
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and "norm" not in name:
            nn.init.normal_(weight, std=0.2)
    return model


def tiny_llama(**changes: Any) -> Any:
    """`tiny_causal_lm("llama")`: four query heads on two KV heads, two layers."""
    return tiny_causal_lm("llama", **changes)


def token_ids(batch_size: int = 2, seq: int = 11, *, vocab_size: int = 64, seed: int = 0) -> Tensor:
    """Random tokens, int64 [batch_size, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch_size, seq), generator=generator)


class TinyMLP(nn.Module):
    """A model without attention: two linear layers over [batch_size, seq, 16]."""

    def __init__(self, *, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class TinyConvNet(nn.Module):
    """A small CNN over images [batch_size, 3, height, width], to ten classes."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.body(torch.relu(self.stem(images))))
        return self.head(features.mean((2, 3)))
