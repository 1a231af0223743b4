"""What a compiled artifact needs of the processor it runs on."""

from __future__ import annotations

import platform
import re

from rewriter import processor

__all__ = ["cpu_kind", "missing_features"]

_INSTRUCTIONS = re.compile(
    r"3dnow|abm$|adx$|aes$|amx|asimd|atomics$|avx|bf16$|bmi|clflush|clwb$|crc32$|cx16$|dotprod$|erms$|"
    r"f16c$|fma$|fp|fsgsbase$|gfni$|i8mm$|lahf|lse|lzcnt$|mov|neon$|pclmul|pmull$|popcnt$|rd|sha|sm[34]|"
    r"sse|ssse|sve|vaes$|vpclmul|xsave"
)
"""Flags that name instructions which `-march=native` may use."""


def cpu_kind() -> dict[str, object]:
    """This machine's architecture and the instructions its processor has."""
    return {"machine": platform.machine(), "instructions": sorted(_flags())}


def missing_features(needed: dict[str, object]) -> list[str]:
    """What an artifact was compiled for and this machine does not have; nothing = it can run."""
    if needed.get("machine") != platform.machine():
        return [str(needed.get("machine"))]
    instructions = needed.get("instructions")
    wanted = set(instructions) if isinstance(instructions, list) else {"unknown instructions"}
    return sorted(wanted - _flags())


def _flags() -> set[str]:
    told = processor.values("flags", "Features").values()
    flags = " ".join(value for found in told for value in found).split()
    return {flag for flag in flags if _INSTRUCTIONS.match(flag)}
