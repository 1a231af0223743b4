"""A random part of the past and a recent window: the control for methods that choose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from passes.bounded_cache import MAX_CHUNK, BoundedCache, CacheFacts, Seen
from rewriter.dialect.random_entries import priorities
from rewriter.engine.cached_attention import CachedAttention
from rewriter.engine.repositioning import Rotated
from rewriter.engine.site import Site
from rewriter.errors import ConfigError

__all__ = ["RandomEntries"]

MOST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class RandomEntries(BoundedCache):
    """Keeps the most recent tokens and a random part of the older ones, at their true positions.

    What it does:
        Replaces the growing cache by `num_random + recent_window` slots. A token that leaves the
        window competes with the kept older ones, and the one with the lowest priority goes: a fixed
        hash of its position and `seed`. So the older ones kept are at any moment a uniformly random
        subset of the past, the same in all layers and however the tokens came in. A method that
        drops entries has to beat this at equal bytes.
    Applies when:
        Decoding was derived, and the mask is causal or a sliding window.
    Does not:
        Count positions anew: the model's own limit on them stays. Leaves alone attentions whose
        cache others read.
    Shapes:
        Keys and values bhsd [batch_size, num_kv_heads, R + W + 1, width] per layer, the last slot
        takes the writes of padding and of tokens that are not kept; positions int64
        [batch_size, R + W + 1] once per program.
    Numerics:
        Approximate; equal to the original, in another order of rounding, while a row has no more
        than R + W tokens.
    Cost:
        One token attends R + W entries whatever came before. Prompts run in chunks of at most
        `MAX_CHUNK` tokens, which sort the priorities once.
    Parameters:
        num_random: R >= 0, tokens kept of those that have left the window.
        recent_window: W >= 1, last tokens that are kept; a model's own sliding window still holds.
        seed: 0 to 2^32 - 1, another subset for each.
        layers: the layers it may touch; None = all.
    Raises:
        ConfigError: a knob out of range.
    Source:
        https://github.com/NVIDIA/kvpress
    """

    name: ClassVar[str] = "random-entries"
    source: ClassVar[str] = "https://github.com/NVIDIA/kvpress"
    entries_op: ClassVar[str] = "random_entries"
    positions_role: ClassVar[str] = "random positions"

    num_random: int = 508
    recent_window: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(num_random=0, recent_window=1, seed=0)
        if self.seed > MOST_SEED:
            raise ConfigError("seed", self.seed, f"at most {MOST_SEED}")

    @property
    def budget(self) -> int:
        """Entries kept of a row."""
        return self.num_random + self.recent_window

    @property
    def max_chunk(self) -> int:
        """Any number would do; a chunk attends itself besides the slots."""
        return MAX_CHUNK

    def inputs(self, site: Site, cached: CachedAttention) -> Rotated:
        """As the attention had them: an entry never moves."""
        return Rotated(site.arguments["q"], cached.k)

    def seen(self, positions: Tensor, own: Tensor) -> Seen:
        """The window, and what fewer than R entries older than the window outrank."""
        distance = own - positions
        past = (positions >= 0) & (distance >= 0)
        older = past & (distance >= self.recent_window)
        priority = priorities(positions, self.seed)
        outranked = older.unsqueeze(1) & (priority.unsqueeze(1) > priority.unsqueeze(2))
        keep = past & (~older | (outranked.sum(2) < self.num_random))
        return Seen(keep, positions, own)

    def exact_setting(self, facts: CacheFacts, *, length: int) -> Self:
        """Everything is kept."""
        return replace(self, num_random=max(length, self.num_random))

    def stress_setting(self, facts: CacheFacts, *, length: int) -> Self:
        """Slots that are full, and then fought for, within `length` tokens."""
        window = max(1, min(self.recent_window, length // 8))
        return replace(self, num_random=min(self.num_random, length // 4), recent_window=window)

    def candidates(self, facts: CacheFacts) -> tuple[Self, ...]:
        """The same window with 128 to 2,048 entries in all."""
        budgets = (128, 256, 512, 1024, 2048)
        return tuple(
            replace(self, num_random=budget - self.recent_window)
            for budget in budgets
            if budget >= self.recent_window
        )
