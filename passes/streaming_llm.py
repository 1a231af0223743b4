"""Sink tokens and a recent window: bounded KV cache for endless decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from passes.bounded_cache import MAX_CHUNK, BoundedCache, CacheFacts, Seen
from passes.random_entries import RandomEntries
from rewriter.engine.cached_attention import CachedAttention
from rewriter.engine.miss import Miss
from rewriter.engine.repositioning import Rotated, rotated
from rewriter.engine.site import Site
from rewriter.program import Decoding, StateSpec

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(BoundedCache):
    """Keeps the first tokens and the most recent ones; positions are ranks among what is kept.

    What it does:
        Replaces the growing cache by `num_sink_tokens` slots for the first positions and a ring of
        `recent_window` slots for the last ones, keys being kept before their rotation. Every call
        rotates by the rank in the cache, so neither memory nor positions grow, and decoding has no
        end. With everything kept the ranks are the positions and nothing changes.
    Applies when:
        Decoding was derived, the mask is causal or a sliding window, and positions enter by a
        rotation of q and k right before the attention, by ALiBi slopes, or not at all.
    Does not:
        Extend what the model understands: tokens outside the window and the sinks are forgotten.
        Leaves alone attentions whose cache others read, keys that are rotated in parts (MLA), and
        models that add their positions to the embeddings.
    Shapes:
        Keys and values bhsd [batch_size, num_kv_heads, S + W + 1, width] per layer, the last slot
        takes the writes of padding; positions int64 [batch_size, S + W + 1] once per program.
    Numerics:
        Approximate; equal to the original, in another order of rounding, while a row has no more
        than S + W tokens.
    Cost:
        One token attends S + W entries whatever came before. Their keys are turned again for
        every token: three more passes over them where no kernel fuses it. Prompts run in chunks of
        at most `MAX_CHUNK` and `recent_window` tokens.
    Parameters:
        num_sink_tokens: S >= 0, first tokens of a row that are always kept.
        recent_window: W >= 1, last tokens that are kept; a model's own sliding window still holds.
        layers: the layers it may touch; None = all.
    Raises:
        ConfigError: a knob out of range.
    Source:
        https://arxiv.org/abs/2309.17453
    """

    name: ClassVar[str] = "streaming-llm"
    source: ClassVar[str] = "https://arxiv.org/abs/2309.17453"
    entries_op: ClassVar[str] = "streaming_entries"
    positions_role: ClassVar[str] = "streaming positions"

    num_sink_tokens: int = 4
    recent_window: int = 1020

    def __post_init__(self) -> None:
        self.require(num_sink_tokens=0, recent_window=1)

    @property
    def budget(self) -> int:
        """Entries kept of a row."""
        return self.num_sink_tokens + self.recent_window

    @property
    def max_chunk(self) -> int:
        """New tokens of one call go to different slots of the ring."""
        return min(self.recent_window, MAX_CHUNK)

    @property
    def first_slots(self) -> int:
        """The sinks."""
        return self.num_sink_tokens

    def inputs(self, site: Site, cached: CachedAttention) -> Rotated | Miss:
        """Before their rotation: every call turns them to where they stand in the cache."""
        return rotated(site, cached, self.name)

    def seen(self, positions: Tensor, own: Tensor) -> Seen:
        """The sinks and the window; the recent ones stand right behind the sinks."""
        shift = (own + 1 - self.budget).clamp_min(0)
        sink = positions < self.num_sink_tokens
        keep = (positions >= 0) & (positions <= own) & (own >= 0)
        keep &= sink | (own - positions < self.recent_window)
        return Seen(keep, torch.where(sink, positions, positions - shift), own - shift)

    def limited(self, decoding: Decoding) -> Decoding:
        """Chunks fit the ring; once every layer counts by rank, positions have no end.

        The ranks of a chunk still have to fit the rotary tables.
        """
        limit, decoding = decoding.max_positions, super().limited(decoding)
        named = {state.positions for state in decoding.states if state.layer is not None}
        counts = [state for state in decoding.states if state.name in named]
        ranked = None not in named and all(s.role == self.positions_role for s in counts)
        budget = max(map(_budget, counts))
        if limit is None or not ranked or budget >= limit:
            return decoding
        chunk = min(decoding.max_chunk or MAX_CHUNK, limit - budget)
        return replace(decoding, max_positions=None, max_chunk=chunk)

    def exact_setting(self, facts: CacheFacts, *, length: int) -> Self:
        """Everything is kept."""
        return replace(self, recent_window=max(length, self.recent_window))

    def stress_setting(self, facts: CacheFacts, *, length: int) -> Self:
        """A ring that wraps and sinks that leave the window within `length` tokens."""
        window = max(1, min(self.recent_window, length // 3))
        return replace(
            self, num_sink_tokens=min(self.num_sink_tokens, length // 8), recent_window=window
        )

    def at_density(self, density: float, *, length: int) -> Self:
        """Sinks are kept as far as the budget goes; at least one recent token is."""
        budget = max(1, round(density * length))
        sinks = min(self.num_sink_tokens, budget - 1)
        return replace(self, num_sink_tokens=sinks, recent_window=budget - sinks)

    def controls(self) -> dict[str, str]:
        """Without sinks; and a random past behind a quarter of the budget."""
        window = max(1, self.budget // 4)
        rest = self.budget - window
        random = RandomEntries(num_random=rest, recent_window=window, layers=self.layers)
        recent = replace(self, num_sink_tokens=0, recent_window=self.budget)
        found = {"random": str(random), "recent-only": str(recent)}
        return {name: spec for name, spec in found.items() if spec != str(self)}

    def candidates(self, facts: CacheFacts) -> tuple[Self, ...]:
        """The same sinks with windows from 124 to 2,044 tokens."""
        budgets = (128, 256, 512, 1024, 2048)
        return tuple(
            replace(self, recent_window=budget - self.num_sink_tokens)
            for budget in budgets
            if budget > self.num_sink_tokens
        )


def _budget(state: StateSpec) -> int:
    """Entries that a state of positions keeps, the spare slot aside."""
    extent = state.dims[1]
    assert isinstance(extent, int)
    return extent - 1
