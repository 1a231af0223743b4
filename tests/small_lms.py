"""Causal LMs of several families, made once per process; tests do not change them."""

from __future__ import annotations

from functools import cache
from typing import Any

from tests.tiny import tiny_causal_lm

__all__ = ["small_lm"]

SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 6},
    "mistral": {"sliding_window": 6},
    "gpt2": {"n_inner": 48},
}


@cache
def small_lm(family: str = "llama", attention: str = "eager") -> Any:
    """A model with vocabulary 128 and 256 positions."""
    sizes = {"vocab_size": 128, "max_position_embeddings": 256}
    return tiny_causal_lm(family, attention=attention, **sizes | SPECIAL.get(family, {}))
