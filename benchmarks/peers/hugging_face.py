"""Hugging Face transformers: eager over a DynamicCache, compiled over a StaticCache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from peers.peer import Facts, Unavailable

__all__ = ["HuggingFace", "llama_facts", "load", "read_model"]


def load(
    model_dir: Path, dtype: str, threads: int, *, mode: str = "", compute_dtype: str = ""
) -> HuggingFace:
    """With a `mode` of torch.compile: compiled; with another dtype: cast. Raises Unavailable."""
    if dtype == "int8" and not compute_dtype:
        raise Unavailable("transformers has no int8 weights for CPUs of its own")
    torch.set_num_threads(threads)
    model = read_model(model_dir)
    return HuggingFace(model.to(getattr(torch, compute_dtype)) if compute_dtype else model, mode)


def read_model(model_dir: Path) -> LlamaForCausalLM:
    """The stored weights in the stored dtype, in memory of their own."""
    return LlamaForCausalLM.from_pretrained(model_dir, dtype="auto").eval()


def llama_facts(model: LlamaForCausalLM, settings: str) -> Facts:
    """Bytes of a tied Llama that keeps keys and values in the dtype of its weights."""
    config: Any = model.config
    size = model.dtype.itemsize
    per_layer = 2 * config.num_key_value_heads * config.head_dim
    return Facts(
        weight_bytes=sum(p.nbytes for p in model.parameters()),
        entry_bytes=per_layer * config.num_hidden_layers * size,
        settings=settings,
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
    )


class HuggingFace:
    """As Hugging Face's own generate does it: the prompt eagerly, then step by step."""

    def __init__(self, model: LlamaForCausalLM, mode: str) -> None:
        self._model, self._static = model, bool(mode)
        self._forward: Any = model.forward
        if mode:
            self._forward = torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)
        settings = f"torch.compile {mode}, StaticCache" if mode else "DynamicCache"
        self.facts = llama_facts(model, settings)

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int], capacity: int) -> Any:
        config = self._model.config
        self._cache: Any = (
            StaticCache(config=config, max_cache_len=capacity)
            if self._static
            else DynamicCache(config=config)
        )
        prompt = torch.tensor([tokens])
        return self._model(prompt, past_key_values=self._cache, logits_to_keep=1).logits[0, -1]

    @torch.no_grad()
    def step(self, token: int) -> Any:
        return self._forward(torch.tensor([[token]]), past_key_values=self._cache).logits[0, -1]
