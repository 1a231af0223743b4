"""Cost models of the project's Triton kernels where configurations are chosen.

`TritonRanker` is for `codegen.tuning.Tuning`, `launch_seconds` for `triton.autotune` through
`codegen.tuning.prune_configs_by`. Both take a level 1 model, learned by `fit` from measurements, where
there is one, else level 0. Level 0 alone says which few are worth measuring and is never sure of the first.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import numpy as np

from codegen.triton_kernels.table import KERNELS
from codegen.tuning import Problem, Ranked
from ir_dataset.cost_models import stored, triton_points
from ir_dataset.cost_models.level0 import GPUS, Gpu
from ir_dataset.cost_models.ranking import RankingModel
from ir_dataset.cost_models.triton_data import SETTINGS, TritonData, plain
from ir_dataset.cost_models.triton_points import PLAIN, features
from ir_dataset.cost_models.triton_work import (
    OPERATORS,
    Resources,
    level0,
    sizes_of_launch,
    work_of,
)
from rewriter.errors import ConfigError

__all__ = [
    "TritonRanker",
    "fit",
    "gpu_of",
    "knobs_of_launch",
    "known_resources",
    "launch_seconds",
    "shipped_model",
]

SHIPPED = "triton_kernels"
"""Name of the model that comes with the package, once it does."""
UNMEASURED = "level 0 alone: nothing was learned from measurements on a GPU"


def fit(data: TritonData, seed: int = 0) -> RankingModel:
    """Learn from measurements what a ranker can see, which is nothing of a compiler."""
    return RankingModel.fit(plain(data.groups), SETTINGS, seed=seed, training_data=data.digest)


def shipped_model() -> RankingModel | None:
    """The model that comes with the package; None while there is none. Raises ArtifactError."""
    try:
        path = stored.shipped(SHIPPED)
    except ConfigError:
        return None
    return RankingModel.load(path)


def gpu_of(device: str, target: str = "cuda:sm_90") -> Gpu:
    """The limits of a device by its name in a `Problem`; those of `target` where it says nothing.

    Raises:
        ConfigError: an unknown target.
    """
    if target not in GPUS:
        raise ConfigError("target", target, f"one of {', '.join(GPUS)}")
    known = {"A100": "cuda:sm_80", "H100": "cuda:sm_90", "H200": "cuda:sm_90"}
    target = next((kind for name, kind in known.items() if name in device), target)
    number = device.rpartition("multiprocessors=")[2]
    gpu = GPUS[target]
    return replace(gpu, multiprocessors=int(number)) if number.isdigit() else gpu


Kind = tuple[str, int, int, int, int, bool]
_OF_RESOURCES = ("registers", "shared_bytes", "spilled_bytes")


def _kind(operator: str, sizes: Mapping[str, int]) -> Kind:
    """What a kernel's registers depend on besides its configuration."""
    element = sizes.get("element_bytes", 2)
    return (
        operator,
        element,
        sizes.get("weight_bytes", element),
        sizes["head_dim"] if "num_heads" in sizes else 0,
        sizes["width"] if operator == "rms_norm" else 0,
        operator == "gemv" and sizes["rows"] == 1,
    )


@functools.cache
def known_resources(path: Path | None = None) -> dict[tuple[Kind, str], Resources]:
    """By kind and configuration what the compiler said, the most of each where texts differ.

    Args:
        path: of points; None = those that come with the package.

    Raises:
        ArtifactError: there are none.
    """
    table, _ = triton_points.read(path or triton_points.shipped())
    names = ("operator", "shape", "config", *_OF_RESOURCES)
    columns = (table.column(name).to_pylist() for name in names)
    found: dict[tuple[Kind, str], Resources] = {}
    for operator, shape, config, *numbers in zip(*columns, strict=True):
        if any(map(math.isnan, numbers)):
            continue
        at = (_kind(operator, json.loads(shape)), config)
        before = found.get(at, Resources(0, 0, 0))
        most = (max(int(new), old) for new, old in zip(numbers, astuple(before), strict=True))
        found[at] = Resources(*most)
    return found


class TritonRanker:
    """`codegen.tuning.Ranker` of the kernels that `codegen.triton_kernels` lets be tuned.

    Level 0 takes registers and shared memory from the points that come with the package, where the same
    kernel was compiled. What does not fit on the device comes last, whatever a model says.

    Args:
        model: learned by `fit`; None = the one that comes with the package, or level 0.
        target: what devices are taken for whose name says nothing.

    Raises:
        ConfigError: a model of other features, or an unknown target.
    """

    def __init__(self, model: RankingModel | None = None, target: str = "cuda:sm_90") -> None:
        if model is not None and model.names != PLAIN:
            raise ConfigError("model", model.names, f"one of the features {', '.join(PLAIN)}")
        gpu_of("", target)
        self.model, self.target = model or shipped_model(), target

    def __call__(self, problem: Problem, candidates: Sequence[Any], default: int) -> Ranked | None:
        """The order of the candidates; None for other kernels."""
        operator, _, backend = problem.kernel.partition(" ")
        if backend != "triton" or operator not in OPERATORS:
            return None
        gpu = gpu_of(problem.device, self.target)
        knobs = [asdict(config) for config in candidates]
        told = [_level0(operator, problem.shape, one, gpu) for one in knobs]
        if self.model is None:
            return Ranked(tuple(np.argsort(told, kind="stable").tolist()), UNMEASURED)
        rows = [_features(operator, problem.shape, one, knobs[default], gpu) for one in knobs]
        found = self.model.rank(np.array(rows), default)
        order = sorted(found.order.tolist(), key=lambda at: math.isinf(told[at]))
        return Ranked(tuple(order), found.unsure, found.far)


def launch_seconds(
    operator: str, model: RankingModel | None = None, target: str = "cuda:sm_90"
) -> Callable[[Mapping[str, Any]], float | None]:
    """Seconds of a launch from a kernel's parameters and a configuration's values, by name.

    What `codegen.tuning.prune_configs_by` takes, for the `@triton.jit` functions of this project. With a
    model (None = as for `TritonRanker`) the number is time beside the best's, not seconds; None where
    nothing like it was learned, or a parameter is missing.

    Raises:
        ConfigError: an operator without an estimate, or an unknown target.
    """
    if operator not in OPERATORS:
        raise ConfigError("operator", operator, f"one of {', '.join(OPERATORS)}")
    gpu, model = gpu_of("", target), model or shipped_model()

    def seconds(values: Mapping[str, Any]) -> float | None:
        try:
            sizes, knobs = sizes_of_launch(operator, values), knobs_of_launch(values)
            if model is None:
                return _level0(operator, sizes, knobs, gpu)
            row = np.array([_features(operator, sizes, knobs, _shipped(operator, sizes), gpu)])
        except KeyError:
            return None
        found = model.rank(row)
        return None if found.far else float(np.exp(found.low + found.high)[0] ** 0.5)

    return seconds


def knobs_of_launch(values: Mapping[str, Any]) -> dict[str, int]:
    """The fields of a configuration: `BLOCK_N` is `block_n`, and so on; Triton's defaults of the rest."""
    names = {name: name.lower() for name in values if name.startswith("BLOCK")}
    names |= {name: name.lower() for name in ("NUM_SPLITS", "num_splits") if name in values}
    told = {"num_warps": 4, "num_stages": 2}
    told |= {name: values[name] for name in told if values.get(name) is not None}
    return {**{field: values[name] for name, field in names.items()}, **told}


def _shipped(operator: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """Knobs of the configuration that ships for such sizes."""
    import torch

    from codegen.kernel import KernelDescription
    from codegen.triton_kernels.tuned import TunedKernel

    form = {"gathered_up": "top_k", "gathered_down": "top_k", "column_sums": "sum"}.get(
        operator, ""
    )
    if operator == "gemv":
        form = "row" if sizes["rows"] == 1 else "rows"
    described = KernelDescription(
        operator=operator,
        dtype=torch.float32 if sizes["element_bytes"] == 4 else torch.bfloat16,
        head_dim=sizes.get("head_dim", sizes.get("width", 0)),
        form=form,
    )
    kernel = next(k for k in KERNELS if isinstance(k, TunedKernel) and k.operator == operator)
    return asdict(kernel.config_for(described))


def _level0(operator: str, sizes: Mapping[str, int], knobs: Mapping[str, int], gpu: Gpu) -> float:
    work = work_of(operator, sizes, knobs, gpu.multiprocessors)
    known = known_resources().get((_kind(operator, sizes), json.dumps(dict(knobs))))
    return level0(gpu, work, knobs["num_warps"], known).seconds


def _features(
    operator: str,
    sizes: Mapping[str, int],
    knobs: Mapping[str, int],
    default: Mapping[str, int],
    gpu: Gpu,
) -> list[float]:
    found = features(operator, sizes, knobs, default, gpu)
    return [found[name] if math.isfinite(found[name]) else math.nan for name in PLAIN]
