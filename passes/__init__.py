"""One method a file. To add one: the file, one line in `PASSES`, its test."""

from __future__ import annotations

from passes.grouped_attention import GroupedAttention
from passes.int8_weights import Int8Weights
from passes.random_entries import RandomEntries
from passes.streaming_llm import StreamingLLM
from rewriter.engine.rewrite_pass import RewritePass

__all__ = ["DEFAULT", "PASSES"]

PASSES: dict[str, type[RewritePass]] = {
    GroupedAttention.name: GroupedAttention,
    Int8Weights.name: Int8Weights,
    RandomEntries.name: RandomEntries,
    StreamingLLM.name: StreamingLLM,
}
"""Every pass by name."""

DEFAULT: tuple[str, ...] = ("grouped-attention",)
"""Specs that `passes="default"` stands for: exact and reassociated ones that always pay."""
