"""The project's own CPU kernels over configurations and shapes, and the ranker that learned from them.

    python -m ir_dataset.cost_models.own_kernels ir_dataset/cost_models/data/own_kernels.parquet

Measured through the kernels' own tuning, in mode `measure`: so each row is what a user's run would find.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codegen.cpp_kernels.gathered_mlp import gathered_mlp
from codegen.cpp_kernels.gemv import gemv, quantize_rows
from codegen.cpp_kernels.sweep import DEFAULT, SweepConfig
from codegen.tuning import Problem, Ranked, Tuning, tuning
from ir_dataset.cost_models import stored
from ir_dataset.cost_models.ranking import Groups, RankingModel, Settings
from rewriter.errors import ArtifactError

__all__ = [
    "KERNEL_FEATURES",
    "NAMES",
    "OwnData",
    "SweepRanker",
    "features",
    "fit",
    "load",
    "measure",
    "problems",
]

KERNEL_FEATURES = (
    *(
        "gathered",
        "log_rows",
        "log_columns",
        "vectors",
        "element_bytes",
        "weight_bytes",
        "log_bytes",
    ),
)
NAMES = (
    *KERNEL_FEATURES,
    *("most_rows", "ahead_bytes", "threads", "sums", "ahead_of_row", "ahead_share", "log_share"),
    *("blocks_of_thread", "row_bytes_of_page"),
)
SETTINGS = Settings(
    members=5, trees=120, leaves=12, rate=0.08, ranker_weight=0.3, kernel_features=KERNEL_FEATURES
)
_SIZE_NAMES = (
    *("rows", "columns", "out_size", "kept", "vectors", "element_bytes", "weight_bytes"),
)
_SIZES = (
    (256, 256), (512, 512), (768, 768), (1024, 1024), (2048, 768), (768, 2048), (3072, 768),
    (2048, 2048), (4096, 1024), (1024, 4096), (576, 1536), (1536, 576), (320, 960), (4096, 4096),
)  # fmt: skip


def problems() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of each: gemv in three dtypes and two numbers of vectors; gathered blocks."""
    torch.manual_seed(0)
    for out_size, in_size in _SIZES:
        weight = torch.randn(out_size, in_size) / in_size**0.5
        narrow, scale = quantize_rows(weight)
        for vectors in (1, 4):
            x = torch.randn(vectors, in_size)
            name = f"{out_size}x{in_size}x{vectors}"
            wide = weight.bfloat16()
            yield f"gemv float32 {name}", lambda x=x, w=weight: gemv(x, w)
            yield f"gemv bfloat16 {name}", lambda x=x, w=wide: gemv(x.bfloat16(), w)
            yield f"gemv int8 {name}", lambda x=x, w=narrow, s=scale: gemv(x, w, s)
        gate, up, down = weight, torch.randn_like(weight), torch.randn_like(weight)
        kept = torch.randperm(out_size)[: out_size // 4]
        x = torch.randn(1, in_size)
        yield (
            f"gathered float32 {out_size}x{in_size}",
            lambda x=x, g=gate, u=up, d=down, k=kept: gathered_mlp(
                x, g, u, d, k, activation="silu"
            ),
        )


def measure() -> Iterator[dict[str, Any]]:
    """Rows of kernel, sizes, knobs and seconds."""
    for name, call in problems():
        with tuning(Tuning("measure")) as how:
            call()
        for choice in how.choices.values():
            for text, seconds in choice.seconds.items():
                config = vars(config_of(text))
                sizes = {f"size_{k}": choice.problem.shape.get(k, 0) for k in _SIZE_NAMES}
                kernel = {"problem": name, "kernel": choice.problem.kernel}
                yield {**kernel, **sizes, **config, "seconds": seconds}


def config_of(text: str) -> SweepConfig:
    """A configuration from its text, `SweepConfig(rows=8, ...)`, without running it."""
    inside = text.partition("(")[2].rstrip(")")
    knobs = dict(part.split("=") for part in inside.split(", "))
    return SweepConfig(**{name: int(value) for name, value in knobs.items()})


def features(kernel: str, sizes: Mapping[str, int], config: SweepConfig, most: int) -> list[float]:
    """In the order of `NAMES`; `most` is the number of threads that 0 stands for."""
    rows, columns, vectors = sizes["rows"], sizes["columns"], sizes["vectors"]
    gathered = kernel.startswith("gathered")
    read = sizes["kept"] if gathered else rows
    row_bytes = columns * sizes["weight_bytes"]
    moved = read * row_bytes * (3 if gathered else 1)
    threads = config.threads or most
    side = config.rows
    while side > 1 and side * vectors > 24:
        side //= 2
    return [
        float(gathered),
        float(np.log2(read)),
        float(np.log2(columns)),
        float(vectors),
        float(sizes["element_bytes"]),
        float(sizes["weight_bytes"]),
        float(np.log2(moved)),
        float(side),
        float(config.ahead_bytes),
        float(threads),
        float(side * vectors),
        config.ahead_bytes / side,
        config.ahead_bytes / side / row_bytes,
        float(np.log2(moved / threads)),
        read / side / threads,
        float(row_bytes % 4096),
    ]


@dataclass(frozen=True)
class OwnData:
    """Measured problems as groups; `names` of the problems by group, and each row's configuration."""

    groups: Groups
    names: tuple[str, ...]
    configs: tuple[SweepConfig, ...]
    default: np.ndarray
    digest: str


def load(path: Path | None = None) -> OwnData:
    """What comes with the package, or another file that `main` wrote. Raises ArtifactError."""
    from pyarrow import parquet

    folder = Path(str(resources.files("ir_dataset.cost_models"))) / "data"
    path = path or folder / "own_kernels.parquet"
    try:
        table = parquet.read_table(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ArtifactError(f"measurements cannot be read: {error}") from error
    rows = table.to_pylist()
    most = int((table.schema.metadata or {}).get(b"threads", b"2"))
    names = list(dict.fromkeys(row["problem"] for row in rows))
    configs = tuple(SweepConfig(**{k: row[k] for k in vars(DEFAULT)}) for row in rows)
    values = []
    for row, config in zip(rows, configs, strict=True):
        sizes = {k.removeprefix("size_"): v for k, v in row.items() if k.startswith("size_") and v}
        values.append(features(row["kernel"], sizes, config, most))
    groups = np.array([names.index(row["problem"]) for row in rows])
    seconds = np.array([row["seconds"] for row in rows])
    default = np.array([config == DEFAULT for config in configs])
    return OwnData(
        Groups(np.array(values), NAMES, groups, seconds), tuple(names), configs, default, digest
    )


def fit(data: OwnData, groups: Sequence[int] | None = None, seed: int = 0) -> RankingModel:
    """Learn from all problems, or from those whose numbers are given."""
    known = data.groups
    if groups is not None:
        known = known.chosen(np.flatnonzero(np.isin(known.groups, list(groups))))
    return RankingModel.fit(known, SETTINGS, seed=seed, training_data=data.digest)


class SweepRanker:
    """`codegen.tuning.Ranker` of kernels that `sweep_rows` reads.

    Args:
        model: learned by `fit`; the one that comes with the package unless given.

    Raises:
        ArtifactError: the stored model is damaged.
    """

    def __init__(self, model: RankingModel | None = None) -> None:
        self.model = model or RankingModel.load(stored.shipped("own_kernels"))

    def __call__(self, problem: Problem, candidates: Sequence[Any], default: int) -> Ranked | None:
        """The order of the candidates; None for kernels that are not of `sweep_rows`."""
        if problem.kernel not in ("gemv cpu", "gathered_mlp cpu"):
            return None
        most = int(problem.device.rpartition("threads=")[2])
        rows = [features(problem.kernel, problem.shape, c, most) for c in candidates]
        found = self.model.rank(np.array(rows), default)
        return Ranked(tuple(int(i) for i in found.order), found.unsure, found.far)


def main(path: Path) -> None:
    """Measure and write."""
    import pyarrow as pa
    from pyarrow import parquet

    from ir_dataset.cost_models.measure import fingerprint

    table = pa.Table.from_pylist(list(measure()))
    told = {**fingerprint(), "threads": str(torch.get_num_threads())}
    parquet.write_table(table.replace_schema_metadata(told), path, compression="zstd")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
