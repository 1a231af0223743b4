"""Level 0 of Triton kernels: sizes from launches, work from sizes, and what does not fit."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes for Linux alone")

from codegen.triton_kernels.generate import load
from ir_dataset.cost_models.level0 import GPUS
from ir_dataset.cost_models.triton_families import FAMILIES, Family, problem, recorded
from ir_dataset.cost_models.triton_points import KERNEL, PLAIN, features
from ir_dataset.cost_models.triton_ranker import knobs_of_launch
from ir_dataset.cost_models.triton_work import (
    OPERATORS,
    Resources,
    level0,
    sizes_of_launch,
    work_of,
)
from rewriter.errors import ConfigError

H100 = GPUS["cuda:sm_90"]
META = torch.device("meta")
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)


def operator(family: Family) -> str:
    return family.kernel.operator


def parameters(family: Family, config: Any) -> dict[str, Any]:
    """Every parameter of the first launch by name, as `triton.autotune` hands them to a model."""
    (first, *_), _ = recorded(family.make(family.shapes[-1], META), config)
    how = load(first.text).LAUNCH
    given = dict(zip(how["signature"], first.arguments, strict=True))
    launch = {name: how[name] for name in ("num_warps", "num_stages")}
    return {**given, **how["constants"], **launch}


def test_every_tuned_operator_has_work() -> None:
    assert {operator(family) for family in FAMILIES.values()} == set(OPERATORS)
    with pytest.raises(ConfigError, match="operator"):
        work_of("merge_lse", {}, {}, 132)
    with pytest.raises(ConfigError, match="operator"):
        sizes_of_launch("merge_lse", {})


@each_family
def test_sizes_of_a_launch_are_those_that_launchers_tell(family: Family) -> None:
    config = family.configurations(family.shapes[-1])[1]
    values = parameters(family, config)
    asked = problem(family.make(family.shapes[-1], META)).shape
    found = sizes_of_launch(operator(family), values)
    assert {n: v for n, v in found.items() if n != "num_splits"}.items() <= asked.items()
    knobs, told = knobs_of_launch(values), asdict(config)
    names = (set(told) & set(knobs)) - {"num_splits", "num_stages"}  # not all launches use these
    assert "num_warps" in names and {n: knobs[n] for n in names} == {n: told[n] for n in names}
    mine = work_of(operator(family), found, knobs, 132)
    assert mine.programs > 0 and mine.flops > 0 and math.isfinite(mine.bytes_moved)


@each_family
def test_programs_are_those_of_the_grid(family: Family) -> None:
    for config in family.configurations(family.shapes[0])[::9]:
        shape = family.shapes[0]
        (first, *_), _ = recorded(family.make(shape, META), config)
        sizes = problem(family.make(shape, META)).shape
        work = work_of(operator(family), sizes, asdict(config), 132)
        assert work.programs == math.prod(first.grid), config


@each_family
def test_features_are_whole_and_kernels_share_theirs(family: Family) -> None:
    shape = family.shapes[0]
    sizes = problem(family.make(shape, META)).shape
    every = family.configurations(shape)
    plain = asdict(every[0])
    rows = [features(operator(family), sizes, asdict(c), plain, H100) for c in every]
    assert all(tuple(row) == PLAIN for row in rows)
    shared = {tuple(row[name] for name in KERNEL) for row in rows}
    assert len(shared) == 1 and not any(map(math.isnan, shared.pop()))
    assert len({tuple(map(str, row.values())) for row in rows}) == len(rows)


def test_spills_and_a_lack_of_room_cost_time() -> None:
    sizes = {"rows": 1, "in_features": 4096, "out_features": 4096, "head_dim": 0, "value_dim": 0}
    sizes |= {"element_bytes": 2, "weight_bytes": 2}
    knobs = {"block_n": 4, "block_k": 1024, "num_warps": 4, "num_stages": 3}
    work = work_of("gemv", sizes, knobs, 132)
    assert work.bytes_moved >= 4096 * 4096 * 2 and not work.matrix
    fits = level0(H100, work, 4, Resources(64, 64, 0))
    assert fits.seconds >= 4096 * 4096 * 2 / H100.bandwidth
    assert level0(H100, work, 4, Resources(64, 64, 256)).seconds > fits.seconds
    none = level0(H100, work, 4, Resources(64, 300 * 1024, 0))
    assert none.seconds == math.inf and none.limit == "shared" and none.beside == 0
    huge = replace(work, tile=4 * 32 * 1000.0)
    guess = Resources.guessed(huge, 4)
    assert guess.registers == 255 and guess.spilled_bytes == 4 * (24 + 1000 - 255)
