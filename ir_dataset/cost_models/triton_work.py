"""What a launch of one of the project's Triton kernels has to do, and the level 0 estimate of its time.

Sizes are those that launchers tell `codegen.tuning`, knobs are the fields of a configuration. Registers and
shared memory are the compiled kernel's where they are known, else what the tiles take: a guess that orders
configurations, no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from codegen.kernel import KernelDescription
from codegen.triton_kernels.attention_limits import tile_width, visible_entries
from codegen.triton_kernels.decode_attention import even_splits
from ir_dataset.cost_models.level0 import Gpu, gpu_seconds, occupancy
from rewriter.errors import ConfigError

__all__ = ["OPERATORS", "Level0", "Resources", "Work", "level0", "sizes_of_launch", "work_of"]

Numbers = Mapping[str, int]
_CACHED = 0.3
"""Of a byte that is read again from the second cache, beside one from memory."""
_LEAST_REGISTERS, _MOST_REGISTERS = 24, 255


@dataclass(frozen=True)
class Work:
    """Of one launch.

    Attributes:
        flops: with what tiles compute for nothing. bytes_moved: from memory.
        programs: of the grid. matrix: whether products run on matrix units.
        tile: 32-bit registers that one program's tiles take. shared_bytes: of its buffers.
    """

    flops: float
    bytes_moved: float
    programs: int
    matrix: bool
    tile: float
    shared_bytes: int


@dataclass(frozen=True)
class Resources:
    """Of a compiled kernel; registers and spilled bytes of one thread."""

    registers: int
    shared_bytes: int
    spilled_bytes: int

    @staticmethod
    def guessed(work: Work, num_warps: int) -> Resources:
        """From the tiles."""
        wanted = _LEAST_REGISTERS + math.ceil(work.tile / (32 * num_warps))
        spilled = 4 * max(0, wanted - _MOST_REGISTERS)
        return Resources(min(wanted, _MOST_REGISTERS), work.shared_bytes, spilled)


@dataclass(frozen=True)
class Level0:
    """The estimate.

    Attributes:
        seconds: infinite where one program does not fit on a multiprocessor.
        beside: programs that share a multiprocessor. warps: theirs. limit: what keeps more out.
        waves: of the grid, not rounded.
    """

    seconds: float
    beside: int
    warps: int
    limit: str
    waves: float


def level0(gpu: Gpu, work: Work, num_warps: int, resources: Resources | None = None) -> Level0:
    """The estimate for a launch; `resources` None = guessed."""
    told = resources or Resources.guessed(work, num_warps)
    try:
        fits = occupancy(
            gpu, registers=told.registers, shared_bytes=told.shared_bytes, num_warps=num_warps
        )
        seconds = gpu_seconds(
            gpu,
            flops=work.flops,
            bytes_moved=work.bytes_moved,
            programs=work.programs,
            registers=told.registers,
            shared_bytes=told.shared_bytes,
            num_warps=num_warps,
            spilled_bytes=told.spilled_bytes,
            matrix=work.matrix,
        )
    except ConfigError as error:
        return Level0(math.inf, 0, 0, error.field, math.inf)
    waves = work.programs / (fits.programs * gpu.multiprocessors)
    return Level0(seconds, fits.programs, fits.warps, fits.limit, waves)


def work_of(operator: str, sizes: Numbers, knobs: Numbers, multiprocessors: int) -> Work:
    """Of a launch.

    Raises:
        ConfigError: an operator that is not one of `OPERATORS`.
    """
    if operator not in _WORKS:
        raise ConfigError("operator", operator, f"one of {', '.join(_WORKS)}")
    return _WORKS[operator](sizes, knobs, multiprocessors)


def _cdiv(number: int, by: int) -> int:
    return -(-number // by)


def _gemv(s: Numbers, k: Numbers, multiprocessors: int) -> Work:
    rows, inputs, outputs = s["rows"], s["in_features"], s["out_features"]
    block_n, block_k, wide = k["block_n"], k["block_k"], s["element_bytes"]
    programs = _cdiv(outputs, block_n)
    weight = outputs * inputs * s["weight_bytes"]
    moved = weight + (rows * (inputs + outputs) + _CACHED * programs * rows * inputs) * wide
    matrix = rows > 1 and wide == 2
    loaded = block_n * block_k * s["weight_bytes"] / 4
    if rows == 1:
        tile = block_n * block_k + loaded + block_k
        return Work(2.0 * outputs * inputs, moved, programs, False, tile, 4 * block_n)
    width = 16
    shared = k["num_stages"] * block_k * (block_n * s["weight_bytes"] + width * wide)
    flops = 2.0 * width * programs * block_n * inputs
    tile = block_n * width + loaded * (1 if s["weight_bytes"] == wide else 2)
    return Work(flops, moved, programs, matrix, tile, shared)


def _rows(s: Numbers, k: Numbers, multiprocessors: int) -> Work:
    size, width = s["rows"] * s["width"], 1 << (s["width"] - 1).bit_length()
    moved = size * s["tensors"] * s["element_bytes"]
    return Work(5.0 * size, moved, s["rows"], False, 2.0 * width, 4 * k["num_warps"])


def _gated(s: Numbers, k: Numbers, multiprocessors: int) -> Work:
    size, block = s["rows"] * s["width"], k["block"]
    programs = s["rows"] * _cdiv(s["width"], block)
    return Work(8.0 * size, 3.0 * size * s["element_bytes"], programs, False, 3.0 * block, 0)


def _gathered_up(s: Numbers, k: Numbers, multiprocessors: int) -> Work:
    rows, count, hidden, tile = s["rows"], s["count"], s["hidden_size"], k["block_s"] * k["block_k"]
    programs = rows * _cdiv(count, k["block_s"])
    read = rows * count * hidden * s["matrices"]
    again = _CACHED * programs * hidden
    moved = (read + again) * s["element_bytes"]
    held = 3.0 * tile + k["block_k"]
    return Work(2.0 * read, moved, programs, False, held, 4 * k["block_s"] * k["num_warps"])


def _gathered_down(s: Numbers, k: Numbers, multiprocessors: int) -> Work:
    rows, count, hidden, splits = s["rows"], s["count"], s["hidden_size"], k["num_splits"]
    programs = rows * _cdiv(hidden, k["block_n"]) * splits
    read = rows * count * hidden
    moved = read * s["element_bytes"] + _CACHED * 8.0 * splits * rows * hidden
    tile = 1.5 * k["block_n"] * k["block_r"]
    return Work(2.0 * read, moved, programs, False, tile, 4 * k["block_n"])


def _decode(s: Numbers, k: Numbers, multiprocessors: int) -> Work:
    block_m, block_n, entries = k["block_m"], k["block_n"], s["entries"]
    kv_heads = s["batch_size"] * s["num_kv_heads"]
    rows = s["num_heads"] // s["num_kv_heads"] * s["q_len"]
    tiles = _cdiv(rows, block_m)
    splits = s.get("num_splits") or k.get("num_splits") or 0
    splits = splits or even_splits(entries, kv_heads, block_n, multiprocessors)
    width, wide = s["head_dim"] + s["value_dim"], s["element_bytes"]
    moved = float(kv_heads * tiles * entries * width * wide)
    moved += _CACHED * 8.0 * splits * kv_heads * rows * s["value_dim"]
    flops = 2.0 * kv_heads * tiles * block_m * entries * width
    return Work(flops, moved, kv_heads * tiles * splits, wide == 2, *_tiles(s, k))


def _prefill(s: Numbers, k: Numbers, multiprocessors: int) -> Work:
    heads, q_len, wide = s["batch_size"] * s["num_heads"], s["q_len"], s["element_bytes"]
    tiles = _cdiv(q_len, k["block_m"])
    seen = s["entries"] - (q_len - 1) / 2 if s["entries"] == s["kv_len"] else s["entries"]
    seen = max(seen, 1.0) + k["block_n"] / 2  # what the last tile hides is computed, too
    width = s["head_dim"] + s["value_dim"]
    cached = s["batch_size"] * s["num_kv_heads"] * s["kv_len"] * width
    again = heads * tiles * seen * width
    moved = (heads * q_len * width + cached + _CACHED * again) * wide
    flops = 2.0 * heads * tiles * k["block_m"] * seen * width
    return Work(flops, moved, heads * tiles, wide == 2, *_tiles(s, k))


def _column_sums(s: Numbers, k: Numbers, multiprocessors: int) -> Work:
    kv_heads, wide = s["batch_size"] * s["num_kv_heads"], s["element_bytes"]
    rows = s["num_heads"] // s["num_kv_heads"] * s["q_len"]
    tiles = _cdiv(s["kv_len"], k["block_n"])
    width = tile_width(s["head_dim"])
    moved = kv_heads * width * (s["kv_len"] + _CACHED * tiles * rows) * wide
    flops = 2.0 * kv_heads * rows * tiles * k["block_n"] * width
    tile = k["block_m"] * k["block_n"] + (k["block_m"] + k["block_n"]) * width * wide / 4
    shared = (k["num_stages"] * k["block_m"] + k["block_n"]) * width * wide
    return Work(flops, moved, kv_heads * tiles, wide == 2, tile, shared)


def _tiles(s: Numbers, k: Numbers) -> tuple[float, int]:
    """Registers and shared memory of attention: queries, scores and sums; keys and values."""
    keys, values = tile_width(s["head_dim"]), tile_width(s["value_dim"])
    block_m, block_n, wide = k["block_m"], k["block_n"], s["element_bytes"]
    tile = block_m * (keys * wide / 4 + values + 1.5 * block_n)
    if wide == 4:
        tile += block_n * (keys + values)  # both tiles stay in registers
    return tile, (k["num_stages"] * block_n * (keys + values) + block_m * keys) * wide


_WORKS: dict[str, Callable[[Numbers, Numbers, int], Work]] = {
    "gemv": _gemv,
    "rms_norm": _rows,
    "gated_activation": _gated,
    "gathered_up": _gathered_up,
    "gathered_down": _gathered_down,
    "decode_attention": _decode,
    "prefill_attention": _prefill,
    "column_sums": _column_sums,
}
OPERATORS = tuple(_WORKS)


# --- from the arguments of a launch --------------------------------------------------------------


def sizes_of_launch(operator: str, values: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that a launcher would tell, from a kernel's parameters by name, constants included.

    Raises:
        ConfigError: an operator that is not one of `OPERATORS`.
        KeyError: a parameter is missing.
    """
    if operator not in _SIZES:
        raise ConfigError("operator", operator, f"one of {', '.join(_SIZES)}")
    first = values[
        "q" if "attention" in operator or operator == "column_sums" else _FIRST[operator]
    ]
    found = _SIZES[operator](values)
    weight = values["weight"].element_size() if operator == "gemv" else first.element_size()
    return {**found, "element_bytes": first.element_size(), "weight_bytes": weight}


_FIRST = {
    "gemv": "x",
    "rms_norm": "x",
    "gated_activation": "gate",
    "gathered_up": "x",
    "gathered_down": "hidden",
}


def _attention_sizes(v: Mapping[str, Any]) -> dict[str, int]:
    layout = v.get("LAYOUT", "bhsd")
    kv_len = v["index"].shape[-1] * v["PAGE_SIZE"] if layout == "paged" else v["k"].shape[2]
    described = KernelDescription(
        operator="attention",
        mask=v["MASK"],
        span=v["SPAN"],
        num_sink_tokens=v["NUM_SINK_TOKENS"],
    )
    batch_size, num_heads, q_len, _ = v["q"].shape
    return {
        "batch_size": batch_size,
        "num_heads": num_heads,
        "q_len": q_len,
        "num_kv_heads": v["k"].shape[1],
        "kv_len": kv_len,
        "entries": visible_entries(described, kv_len),
        "head_dim": v["HEAD_DIM"],
        "value_dim": v.get("VALUE_DIM", v["HEAD_DIM"]),
        "num_splits": v.get("num_splits", 0),
    }


_SIZES: dict[str, Callable[[Mapping[str, Any]], dict[str, int]]] = {
    "gemv": lambda v: {n: v[n] for n in ("rows", "in_features", "out_features")},
    "rms_norm": lambda v: {
        "rows": v["x"].shape[0],
        "width": v["WIDTH"],
        "tensors": 4 if v["RESIDUAL"] else 2,
    },
    "gated_activation": lambda v: {"rows": v["gate"].shape[0], "width": v["width"]},
    "gathered_up": lambda v: {
        "rows": v["x"].shape[0],
        "count": v["count"],
        "hidden_size": v["hidden_size"],
        "matrices": 2 if v["GATHER"] else 1,
    },
    "gathered_down": lambda v: {n: v[n] for n in ("rows", "count", "hidden_size")},
    "decode_attention": _attention_sizes,
    "prefill_attention": _attention_sizes,
    "column_sums": _attention_sizes,
}
