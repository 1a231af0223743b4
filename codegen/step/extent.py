"""Sizes and strides of a step: known when the text is made, or an expression of its C++ arguments."""

from __future__ import annotations

__all__ = ["CAPACITY", "ENTRIES", "Extent", "plus", "times"]

Extent = int | str
"""An integer, or C++ text of `entries` (kept before the call) and `capacity` (of the growing states)."""

ENTRIES, CAPACITY = "entries", "capacity"


def times(a: Extent, b: Extent) -> Extent:
    """a · b, as short as it goes."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if 0 in (a, b):
        return 0
    if a == 1 or b == 1:
        return b if a == 1 else a
    return f"({a}) * ({b})"


def plus(a: Extent, b: Extent) -> Extent:
    """a + b, as short as it goes."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0 or b == 0:
        return b if a == 0 else a
    return f"{a} + {b}"
