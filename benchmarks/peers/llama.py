"""The model that all candidates decode: a Llama with random weights, as a Hugging Face directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from peers.peer import prepared

__all__ = ["SHAPES", "Shape", "stored_config", "stored_tensors", "write_model"]

SHARPNESS = 2.0
"""Standard deviation of attention's scores. With the usual random weights of narrow models attention is
nearly uniform, and wrong rotations pass; with those of wide ones, rounding to bfloat16 changes it."""


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float = 10_000.0

    def config(self) -> LlamaConfig:
        """As Hugging Face writes it."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden_size // self.heads,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 512),
    "110m": Shape(768, 12, 12, 12, 2048, 32_000),
    "110m-gqa": Shape(768, 12, 12, 4, 2048, 32_000),
    "1b": Shape(2048, 16, 32, 8, 8192, 128_256, rope_theta=500_000.0),
}
"""`1b` is the shape of Llama 3.2 1B, whose vocabulary has 128,256 tokens; none scales its rotations."""


def write_model(directory: Path, shape: Shape, dtype: torch.dtype) -> Path:
    """The same weights at every call, rounded to `dtype`."""

    def write(path: Path) -> None:
        logging.disable_progress_bar()
        _model(shape, dtype).save_pretrained(path)
        _tokenizer(shape.vocab_size).save_pretrained(path)

    return prepared(directory, write)


def _model(shape: Shape, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(shape.config()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.1 * torch.randn_like(weight)
            elif "q_proj" in name or "k_proj" in name:
                weight.normal_(0.0, (SHARPNESS / shape.hidden_size) ** 0.5)
    return model.to(dtype)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words of no meaning; converters ask for one."""
    words = {f"t{token}": token for token in range(vocab_size)}
    model = Tokenizer(WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="t0", bos_token="t1", eos_token="t2"
    )


def stored_config(model_dir: Path) -> dict[str, Any]:
    """The directory's `config.json`."""
    return json.loads((model_dir / "config.json").read_text(encoding="utf-8"))


def stored_tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    """All weights by name, mapped from the file."""
    tensors = dict[str, torch.Tensor]()
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors
