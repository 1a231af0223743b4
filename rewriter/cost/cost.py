"""What an operator costs: arithmetic, memory traffic and launches."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cost"]


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes read plus written, and kernel launches."""

    flops: float = 0.0
    bytes_moved: float = 0.0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.launches + other.launches,
        )
