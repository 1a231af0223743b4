"""Learn the models that come with the package, from its measurements and from a corpus.

    python -m ir_dataset.cost_models.train own_kernels
    python -m ir_dataset.cost_models.train cpu
    python -m ir_dataset.cost_models.train size_oz --dataset DIRECTORY

A model is written to `ir_dataset/cost_models/models/`, or to `--out`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ir_dataset.cost_models import cpu_data, own_kernels, size, size_data
from ir_dataset.cost_models.ranking import RankingModel
from ir_dataset.cost_models.settings import CPU, SHIPPED_SIZE

__all__ = ["TRAINED", "cpu_model", "own_kernel_model", "size_model"]

_MODELS = Path(__file__).parent / "models"


def own_kernel_model() -> RankingModel:
    """Of gemv and the gathered block, from all that was measured."""
    return own_kernels.fit(own_kernels.load())


def cpu_model() -> RankingModel:
    """Of the CPU families, from all that was measured."""
    data = cpu_data.load()
    return RankingModel.fit(data.groups, CPU, training_data=data.digest)


def size_model(kind: str, dataset: Path) -> size.SizeModel:
    """Of one level, from all functions of a dataset that `rewriter ir run` wrote."""
    data = size_data.read(dataset)
    settings = replace(SHIPPED_SIZE, kind=kind)
    return size.SizeModel.fit(data.rows(kind), settings, training_data=data.digest)


TRAINED: dict[str, Callable[[Path], RankingModel | size.SizeModel]] = {
    "own_kernels": lambda _: own_kernel_model(),
    "cpu": lambda _: cpu_model(),
    "size_oz": lambda place: size_model("Oz", place),
    "size_o2": lambda place: size_model("O2", place),
}
"""By the name under which `stored.shipped` finds it."""


def main() -> None:
    """Learn one and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(TRAINED))
    parser.add_argument("--dataset", type=Path, default=Path("ir-dataset"))
    parser.add_argument("--out", type=Path, default=_MODELS)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    TRAINED[chosen.name](chosen.dataset).save(chosen.out / f"{chosen.name}.json.gz")


if __name__ == "__main__":
    main()
