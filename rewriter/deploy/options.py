"""How to generate: the next token from logits, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.errors import ConfigError

__all__ = ["Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to choose tokens: at temperature 0 always the most likely one; and when to stop.

    Attributes:
        max_new_tokens: most tokens to generate.
        temperature: what logits are divided by.
        top_k: only the k most likely tokens; None = all.
        top_p: only the fewest most likely tokens that together have this probability; None = all.
        seed: of the random numbers; None = another one each time.
        stop: words that end the text; they are not part of it.
        ignore_eos: go on after the end of a sequence.

    Raises:
        ConfigError: a value that is not allowed, or top_k or top_p at temperature 0.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", self.max_new_tokens, "1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError("temperature", self.temperature, "0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "above 0, at most 1")
        if self.seed is not None and self.seed < 0:
            raise ConfigError("seed", self.seed, "0 or more")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError("stop", self.stop, "words, none of them empty")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise ConfigError(name, getattr(self, name), "only with a temperature above 0")

    def generator(self) -> np.random.Generator:
        """Fresh random numbers for one generation."""
        return np.random.default_rng(self.seed)

    def choose(self, logits: NDArray[Any], random: np.random.Generator) -> NDArray[np.int64]:
        """One token of each row.

        Args:
            logits: float [batch, vocab].

        Returns:
            int64 [batch].
        """
        if self.temperature == 0:
            return logits.argmax(axis=-1).astype(np.int64)
        return np.array([self._draw(row, random) for row in logits], dtype=np.int64)

    def _draw(self, logits: NDArray[Any], random: np.random.Generator) -> int:
        scores = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scores, kind="stable")[: self.top_k]
        weights = np.exp(scores[order] - scores[order[0]])
        weights /= weights.sum()
        if self.top_p is not None:
            kept = int(np.searchsorted(weights.cumsum(), self.top_p)) + 1
            weights = weights[:kept] / weights[:kept].sum()
        position = np.searchsorted(weights.cumsum(), random.random(), side="right")
        return int(order[min(position, len(weights) - 1)])
