"""One row for each configuration of a Triton kernel at a shape: sizes, knobs, level 0, compiled code.

Rows of what did not compile are there with the reason; numbers that are not known are NaN.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ir_dataset.cost_models.level0 import GPUS, Gpu
from ir_dataset.cost_models.triton_code import CODE, LLIR
from ir_dataset.cost_models.triton_families import problem
from ir_dataset.cost_models.triton_pack import Pack, Point
from ir_dataset.cost_models.triton_work import Resources, Work, level0, work_of
from rewriter.errors import ArtifactError

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "FILE",
    "GUESSED",
    "KERNEL",
    "KNOBS",
    "LEVEL0",
    "PLAIN",
    "digest",
    "features",
    "read",
    "shipped",
    "table",
    "target_of",
    "told",
    "write",
]

FILE = "points.parquet"
KERNEL = (
    *("matrix", "log_flops", "log_bytes", "intensity", "log_rows", "element_bytes", "weight_bytes"),
    *("head_dim", "log_entries"),
)
"""The same for all configurations of a kernel at a shape: what out-of-distribution is judged by."""
KNOBS = (
    *("block_m", "block_n", "block_k", "block_s", "block_r", "block", "num_splits"),
    *("num_warps", "num_stages"),
)
_ESTIMATE = ("log_seconds", "log_waves", "fill", "beside", "warps")
DERIVED = ("log_programs", "log_program_bytes", "log_program_flops", "tile_of_thread", "tile_kib")
GUESSED = tuple(f"guessed_{name}" for name in _ESTIMATE)
LEVEL0 = tuple(f"level0_{name}" for name in _ESTIMATE)
"""With the registers and the shared memory that the compiler says."""
PLAIN = (*KERNEL, *KNOBS, *DERIVED, *GUESSED)
"""Features that need no compiler: what a ranker has before anything is compiled."""
_TEXTS = ("family", "operator", "shape", "config", "key", "reason", "unread")


@dataclass(frozen=True)
class Told:
    """Sizes of a problem with the features that all of its configurations share."""

    operator: str
    sizes: Mapping[str, int]


def features(
    operator: str,
    sizes: Mapping[str, int],
    knobs: Mapping[str, int],
    default: Mapping[str, int],
    gpu: Gpu,
) -> dict[str, float]:
    """By the names of `PLAIN`, from what a launcher tells `codegen.tuning`.

    Args:
        default: knobs of the default configuration, by which kernels are told apart.
    """
    work = work_of(operator, sizes, knobs, gpu.multiprocessors)
    plain = work_of(operator, sizes, default, gpu.multiprocessors)
    warps = knobs["num_warps"]
    rows = sizes.get("num_heads", 1) * sizes.get("batch_size", 1) * sizes.get("q_len", 1)
    found = {
        "matrix": float(work.matrix),
        "log_flops": math.log2(plain.flops),
        "log_bytes": math.log2(plain.bytes_moved),
        "intensity": plain.flops / plain.bytes_moved,
        "log_rows": math.log2(rows * sizes.get("rows", 1)),
        "element_bytes": float(sizes["element_bytes"]),
        "weight_bytes": float(sizes["weight_bytes"]),
        "head_dim": float(sizes.get("num_heads", 0) and sizes["head_dim"]),
        "log_entries": math.log2(_depth(sizes)),
        **{name: float(knobs.get(name, math.nan)) for name in KNOBS},
        "log_programs": math.log2(work.programs),
        "log_program_bytes": math.log2(work.bytes_moved / work.programs),
        "log_program_flops": math.log2(work.flops / work.programs),
        "tile_of_thread": work.tile / (32 * warps),
        "tile_kib": work.shared_bytes / 1024,
    }
    return found | _estimated("guessed", gpu, work, warps, None)


def _depth(sizes: Mapping[str, int]) -> int:
    """How much one result sums over, or the width of a row."""
    names = ("entries", "in_features", "hidden_size", "width")
    return next(sizes[name] for name in names if name in sizes)


def _estimated(
    prefix: str, gpu: Gpu, work: Work, warps: int, resources: Resources | None
) -> dict[str, float]:
    told = level0(gpu, work, warps, resources)
    waves = told.waves
    values = {
        "log_seconds": math.log2(told.seconds) if math.isfinite(told.seconds) else math.nan,
        "log_waves": math.log2(waves) if math.isfinite(waves) else math.nan,
        "fill": waves / math.ceil(waves) if math.isfinite(waves) else math.nan,
        "beside": float(told.beside),
        "warps": float(told.warps),
    }
    return {f"{prefix}_{name}": value for name, value in values.items()}


# --- the file ------------------------------------------------------------------------------------


def table(pack: Pack, points: Sequence[Point]) -> pyarrow.Table:
    """All points of a pack, in order."""
    import pyarrow as pa

    gpu = GPUS[pack.target]
    problems: dict[tuple[str, str], Told] = {}
    rows: dict[str, dict[str, Any]] = {}
    found: list[dict[str, Any]] = []
    for point in points:
        shape = json.dumps(dict(point.shape))
        at = (point.family.name, shape)
        if at not in problems:
            problems[at] = _told(point)
        if point.keys[0] not in rows:
            rows[point.keys[0]] = pack.row(point.keys[0]) or {"reason": "not compiled yet"}
        found.append(_row(point, shape, problems[at], rows[point.keys[0]], gpu))
    columns = {name: [row.get(name) for row in found] for name in (*_TEXTS, "default")}
    numbers = ("seconds", *PLAIN, *LEVEL0, *CODE, *LLIR)
    columns |= {name: _floats(row.get(name, math.nan) for row in found) for name in numbers}
    return pa.table(columns)


def _floats(values: Iterable[float]) -> np.ndarray:
    return np.fromiter(values, np.float32)


def _told(point: Point) -> Told:
    import torch

    asked = problem(point.family.make(point.shape, torch.device("meta")))
    return Told(asked.kernel.removesuffix(" triton"), asked.shape)


def _row(
    point: Point, shape: str, asked: Told, compiled: Mapping[str, Any], gpu: Gpu
) -> dict[str, Any]:
    kernel = point.family.kernel
    default = kernel.config_for(point.family.describe(point.shape))
    knobs, plain = asdict(point.config), asdict(default)
    row: dict[str, Any] = {
        "family": point.family.name,
        "operator": asked.operator,
        "shape": shape,
        "config": json.dumps(knobs),
        "key": point.keys[0],
        "default": point.config == default,
        "reason": compiled.get("reason", ""),
        "unread": compiled.get("unread", ""),
        "seconds": compiled.get("seconds", math.nan),
        **features(asked.operator, asked.sizes, knobs, plain, gpu),
    }
    values = compiled.get("values")
    if values is None:
        return row
    found = Resources(*(int(values[n]) for n in ("registers", "shared_bytes", "spilled_bytes")))
    work = work_of(asked.operator, asked.sizes, knobs, gpu.multiprocessors)
    return row | values | _estimated("level0", gpu, work, knobs["num_warps"], found)


def write(found: pyarrow.Table, pack: Pack) -> Path:
    """Write `FILE` into the pack, whole or not at all, with target and versions in its metadata."""
    from importlib.metadata import version

    from pyarrow import parquet

    path = pack.store.root / FILE
    told = {"target": pack.target, "triton": version("triton"), "torch": version("torch")}
    half = path.with_suffix(".writing")
    parquet.write_table(
        found.replace_schema_metadata(told), half, compression="zstd", compression_level=12
    )
    os.replace(half, path)
    return path


def shipped() -> Path:
    """The points for sm_90 that come with the package."""
    return Path(str(resources.files("ir_dataset.cost_models"))) / "data" / "triton_sm_90.parquet"


def read(path: Path) -> tuple[pyarrow.Table, str]:
    """A file that `write` wrote, and a hash of its points and their compiled texts.

    Raises:
        ArtifactError: it is missing, or no such file.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        found = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"points cannot be read: {error}") from error
    missing = {*_TEXTS, "default", *PLAIN, *LEVEL0} - set(found.column_names)
    if missing:
        raise ArtifactError(f"{path} lacks {', '.join(sorted(missing))}")
    columns = (found.column(name).to_pylist() for name in ("family", "shape", "config", "key"))
    rows = sorted(zip(*columns, strict=True))
    return found, hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def digest(root: Path) -> str:
    """Of a pack's points, as `read` gives it. Raises ArtifactError."""
    return read(root / FILE)[1]


def target_of(root: Path) -> str:
    """What a pack was compiled for. Raises ArtifactError."""
    metadata = read(root / FILE)[0].schema.metadata or {}
    return metadata.get(b"target", b"").decode()


def told(found: pyarrow.Table) -> str:
    """Points, failures, spills and unread IR, by family, as text."""
    lines = ["family, points, texts, failed, spilling, IR unread, compile seconds of a text"]
    columns = {name: found.column(name).to_numpy(zero_copy_only=False) for name in _SHOWN}
    for family in dict.fromkeys(columns["family"]):
        own = columns["family"] == family
        _, first = np.unique(columns["key"][own], return_index=True)
        of = {name: values[own][first] for name, values in columns.items()}
        failed, unread = (Counter(map(bool, of[n]))[True] for n in ("reason", "unread"))
        spilling = int((of["spilled_bytes"] > 0).sum())
        taken = f"{np.nanmean(of['seconds']):.2f}" if failed < len(first) else ""
        cells = (family, own.sum(), len(first), failed, spilling, unread, taken)
        lines.append(", ".join(map(str, cells)))
    return "\n".join(lines)


_SHOWN = ("family", "key", "reason", "unread", "spilled_bytes", "seconds")
