"""What makes two functions, or two modules, the same: hashes that do not depend on names.

- `norm_hash` of a function: signature, attributes and body are equal but for the names of values, blocks,
  types and globals, for metadata and for linkage. GEP types, alignments, flags and constants count.
- `fn_hash` of a function: opcodes, types and called intrinsics follow each other in the same way.
- MinHash of a function: an estimate of how many 4-shingles of `fn_hash`'s tokens two functions share.
- `norm_hash` of a module: the same functions under the same names, and the same globals, in any order.

LLVM's structural hash is offered beside these. It leaves GEP types, alignments and flags out, and it may
change between versions of LLVM, so it never decides alone.
"""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ir_dataset.ir_text import Function, Module

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "MIN_INSTRUCTIONS",
    "PERMUTATIONS",
    "function_hash",
    "minhashes",
    "module_hash",
    "normal_hash",
    "structural_hash",
    "unpack_minhash",
]

PERMUTATIONS = 64
SHINGLE = 4
MIN_INSTRUCTIONS = 20
"""Shorter functions get no MinHash: many of them look alike without being copies."""

_MASK = (1 << 64) - 1
_CHUNK = 1 << 15


def _sha(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:digits]


def normal_hash(function: Function) -> str:
    """First 128 bits, as 32 digits, of the normalised function's sha256."""
    return _sha(f"{function.signature}\n{function.body}", 32)


def function_hash(function: Function) -> str:
    """64 bits, as 16 digits, of the sequence of opcodes and types."""
    shapes = function.shapes
    blocks = (
        ";".join([shape.token for shape in shapes[block.start : block.stop]])
        for block in function.blocks
    )
    return _sha("\n".join(blocks), 16)


def module_hash(module: Module, hashes: Sequence[str]) -> str:
    """128 bits of everything in the module but the order, the file's name and metadata.

    Args:
        hashes: `normal_hash` of each of its functions, in order.
    """
    functions = (
        " ".join((function.name, function.linkage, own, *function.globals))
        for function, own in zip(module.functions, hashes, strict=True)
    )
    parts = (functions, module.globals, module.declarations, module.asm)
    text = "\n\n".join("\n".join(sorted(part)) for part in parts)
    return _sha(f"{module.triple}\n{module.layout}\n{text}", 32)


def _constants(number: int) -> list[int]:
    """64-bit constants from SplitMix64, which is the same everywhere and forever."""
    state, found = 0x9E3779B97F4A7C15, []
    for _ in range(number):
        state = state + 0x9E3779B97F4A7C15 & _MASK
        mixed = state
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
        found.append(mixed ^ mixed >> 31)
    return found


def minhashes(functions: Sequence[Function]) -> list[str]:
    """The MinHash of each function as 160 characters; empty below `MIN_INSTRUCTIONS`.

    64 times the lowest of the shingles' hashes, 16 bits of each, packed in base 85.

    Source: https://en.wikipedia.org/wiki/MinHash
    """
    import numpy as np

    found = [""] * len(functions)
    chosen = [at for at, one in enumerate(functions) if len(one.shapes) >= MIN_INSTRUCTIONS]
    start = 0
    while start < len(chosen):
        stop, size = start, 0
        while stop < len(chosen) and (size == 0 or size < _CHUNK):
            size += len(functions[chosen[stop]].shapes)
            stop += 1
        codes = [
            np.array([shape.code for shape in functions[at].shapes], np.uint64)
            for at in chosen[start:stop]
        ]
        for at, row in zip(chosen[start:stop], _signatures(codes), strict=True):
            found[at] = base64.b85encode(row.tobytes()).decode()
        start = stop
    return found


def _signatures(codes: Sequence[np.ndarray]) -> np.ndarray:
    """uint16 [functions, permutations] from each function's token hashes."""
    import numpy as np

    constants = np.array(_constants(SHINGLE + 2 * PERMUTATIONS), np.uint64) | np.uint64(1)
    weights, factors = constants[:SHINGLE], constants[SHINGLE : SHINGLE + PERMUTATIONS]
    offsets = constants[SHINGLE + PERMUTATIONS :]
    windows = [np.lib.stride_tricks.sliding_window_view(row, SHINGLE) for row in codes]
    shingles = [(window * weights).sum(axis=1, dtype=np.uint64) for window in windows]
    values = np.concatenate(shingles)
    values ^= values >> np.uint64(32)
    starts = np.cumsum([0, *(len(row) for row in shingles)])
    result = np.full((len(codes), PERMUTATIONS), 0xFFFFFFFF, np.uint64)
    for begin in range(0, len(values), _CHUNK):
        end = min(begin + _CHUNK, len(values))
        hashed = (values[begin:end, None] * factors + offsets) >> np.uint64(32)
        first = int(np.searchsorted(starts, begin, "right")) - 1
        last = int(np.searchsorted(starts, end, "left"))
        places = np.maximum(starts[first:last] - begin, 0)
        lowest = np.minimum.reduceat(hashed, places)
        result[first:last] = np.minimum(result[first:last], lowest)
    return (result & np.uint64(0xFFFF)).astype("<u2")


def unpack_minhash(packed: str) -> np.ndarray:
    """uint16 [permutations] of what `minhashes` gave for one function."""
    import numpy as np

    return np.frombuffer(base64.b85decode(packed), "<u2")


def structural_hash(data: bytes, opt: str, *, timeout_s: float = 60) -> str:
    """LLVM's detailed structural hash of a module in hexadecimal; empty where opt fails.

    Args:
        data: bitcode or assembly.
        opt: path of LLVM's `opt`.
    """
    command = [opt, "-passes=print<structural-hash><detailed>", "-disable-output", "-"]
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, timeout=timeout_s, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        return ""
    found = re.search(rb"Module Hash: ([0-9a-f]+)", done.stderr + done.stdout)
    return found.group(1).decode() if found and done.returncode == 0 else ""
