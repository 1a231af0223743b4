"""What verification tries and what it accepts."""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.errors import ConfigError

__all__ = ["Verification"]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Settings of `optimize(verify=...)`.

    Attributes:
        length: tokens of a sequence that is tried (causal LMs).
        decode_steps: tokens of it that are fed one at a time.
        seed: of the random inputs.
        max_kl: most mean KL divergence (nats) of an approximate program to the original; None = any.
        min_top1: least share of positions with the same most likely token; None = any.
        max_relative_l2: most relative error of an approximate rewrite at its site; None = any.

    Raises:
        ConfigError: a value out of range.
    """

    length: int = 24
    decode_steps: int = 4
    seed: int = 0
    max_kl: float | None = None
    min_top1: float | None = None
    max_relative_l2: float | None = None

    def __post_init__(self) -> None:
        if self.length < 8:
            raise ConfigError("length", self.length, "an integer of at least 8")
        if not 1 <= self.decode_steps <= self.length // 2:
            raise ConfigError("decode_steps", self.decode_steps, f"1 to {self.length // 2}")
        for name in ("max_kl", "min_top1", "max_relative_l2"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(name, value, "a number of at least 0, or None")
