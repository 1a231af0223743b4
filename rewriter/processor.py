"""What the system tells of the processor."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["name", "values"]


def values(*fields: str) -> dict[str, tuple[str, ...]]:
    """Distinct values of these fields over all cores, in their order; () where there is no such field."""
    found: dict[str, dict[str, None]] = {field: {} for field in fields}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for field, _, value in (line.partition(":") for line in lines):
        if field.strip() in found:
            found[field.strip()][value.strip()] = None
    return {field: tuple(told) for field, told in found.items()}


def name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    told = values("model name")["model name"]
    return told[0] if told else platform.processor() or platform.machine()
