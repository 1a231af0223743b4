"""Measurements of Triton configurations: joined with features, learned from, judged.

Seconds here are synthetic: made by a formula from the knobs, as there is no GPU. What is tested is that the
models find the formula's order, and that nothing else is believed.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton comes for Linux alone")
for needed in ("lightgbm", "pyarrow", "msgspec"):
    pytest.importorskip(needed)

# ruff: noqa: E402
from codegen.triton_kernels.gated_activation import GATED_ACTIVATION
from codegen.triton_kernels.gemv import gemv, gemv_reference
from codegen.tuning import Problem, Tuning, prune_configs_by, tuning
from ir_dataset.cost_models import triton_data, triton_evaluate, triton_points
from ir_dataset.cost_models.level0 import GPUS
from ir_dataset.cost_models.ranking import RankingModel
from ir_dataset.cost_models.triton_data import TritonData, document, load, plain
from ir_dataset.cost_models.triton_evaluate import held_out, selectors
from ir_dataset.cost_models.triton_families import FAMILIES, Family, problem
from ir_dataset.cost_models.triton_pack import Pack, planned
from ir_dataset.cost_models.triton_points import PLAIN
from ir_dataset.cost_models.triton_ranker import (
    UNMEASURED,
    TritonRanker,
    fit,
    gpu_of,
    known_resources,
    launch_seconds,
    shipped_model,
)
from rewriter.errors import ArtifactError, ConfigError

NAMES = ("gated_activation", "gathered_up")
SYNTHETIC = {"gpu": "SYNTHETIC: a formula, not a device"}


@dataclass(frozen=True)
class Kept:
    """A directory with points and measurements."""

    pack: Path
    measured: Path


def formula(knobs: dict[str, int], shape: dict[str, int]) -> float:
    """Best at 8 warps and 2048 values of a program, whatever the size."""
    values = knobs["block"] if "block" in knobs else knobs["block_s"] * knobs["block_k"]
    size = math.prod(shape.values()) ** 0.5
    slower = 0.3 * abs(math.log2(knobs["num_warps"] / 8)) + 0.4 * abs(math.log2(values / 2048))
    return 1e-8 * size * (1 + slower)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    place = tmp_path_factory.mktemp("measured")
    pack = Pack(place, "cuda:sm_90")
    points = [point for point, _ in planned("cuda:sm_90", [FAMILIES[name] for name in NAMES])]
    triton_points.write(triton_points.table(pack, points), pack)
    random, lines = np.random.default_rng(0), {}
    for point in points:
        at = (point.family.name, json.dumps(dict(point.shape)))
        line = {"family": at[0], "shape": dict(point.shape), "clocks": [None], "texts": {}}
        configs = lines.setdefault(at, {**line, "configs": []})["configs"]
        knobs = asdict(point.config)
        told = [formula(knobs, dict(point.shape)) * random.uniform(1, 1.01) for _ in range(4)]
        configs.append({"config": knobs, "reason": "", "min": told, "median": told})
    first = next(iter(lines.values()))["configs"][3]
    first.update(reason="cuModuleLoadData failed with 1", min=[], median=[])
    points_told = {"hash": triton_points.digest(place), "target": "cuda:sm_90"}
    measured = place / "triton-configs.json"
    measured.write_text(json.dumps(document(list(lines.values()), SYNTHETIC, points_told)))
    return Kept(place, measured)


@pytest.fixture(scope="module")
def data(kept: Kept) -> TritonData:
    return load(kept.measured, kept.pack / triton_points.FILE)


def test_a_configuration_that_was_not_measured_is_left_out(kept: Kept, data: TritonData) -> None:
    families = [FAMILIES[name] for name in NAMES]
    rows = sum(len(f.shapes) * len(f.configurations(f.shapes[0])) for f in families)
    assert len(data.last) == rows - 1 and data.names == NAMES
    shapes = sum(len(family.shapes) for family in families)
    assert data.default.sum() == shapes == len(np.unique(data.groups.groups))
    found = triton_data.read_document(kept.measured)
    assert found["shapes"][0]["reasons"] == {"3": "cuModuleLoadData failed with 1"}
    assert found["machine"] == SYNTHETIC
    assert set(PLAIN) <= set(data.groups.names)
    assert plain(data.groups).names == PLAIN


def test_models_learn_the_order_and_the_table_is_whole(
    data: TritonData, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(triton_data.SETTINGS, members=2, trees=60)
    monkeypatch.setattr(triton_evaluate, "SETTINGS", few)
    found = dict(selectors(data, seeds=1))
    assert list(found)[:4] == ["noise floor", "default", "best static (in sample)", "level 0"]
    assert {f"level 1, held-out {kind}" for kind in ("shape", "family", "random")} <= set(found)
    (floor,), (shape,), (random,) = (
        found[name] for name in ("noise floor", "level 1, held-out shape", "random")
    )
    assert floor["top1"] < 1.02
    assert shape["top1"] < 1.1 < random["top1"] and shape["tau"] > 0.8
    assert held_out(data, plain(data.groups), "shape", 5, 0)["top3"] < 1.05


def test_what_does_not_belong_together_is_refused(kept: Kept, tmp_path: Path) -> None:
    points = kept.pack / triton_points.FILE
    found = json.loads(kept.measured.read_text())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**found, "format": 9}, "another format"),
        ({**found, "points": {"hash": "0"}}, "is not what was measured"),
        ({**found, "shapes": found["shapes"][:1]}, "two shapes"),
        ({**found, "shapes": [{**found["shapes"][0], "family": "gemv_row"}]}, "points lack"),
    ]
    for content, message in wrong:
        path = tmp_path / "wrong.json"
        path.write_text(json.dumps(content))
        with pytest.raises(ArtifactError, match=message):
            load(path, points)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(tmp_path / "missing.json", points)


# --- where configurations are chosen -------------------------------------------------------------


def asked(name: str) -> tuple[Problem, list[Any]]:
    return problem_of(FAMILIES[name], 1)


def problem_of(family: Family, number: int) -> tuple[Problem, list[Any]]:
    shape = family.shapes[number]
    return problem(family.make(shape, torch.device("meta"))), family.configurations(shape)


def test_a_learned_model_ranks_and_is_stored(data: TritonData, tmp_path: Path) -> None:
    fit(data).save(tmp_path / "model.json.gz")
    model = RankingModel.load(tmp_path / "model.json.gz")
    assert model.training_data == data.digest
    told, every = asked("gated_activation")
    found = TritonRanker(model)(told, every, 0)
    assert found is not None and not found.unsure
    best = every[found.order[0]]
    assert (best.block, best.num_warps) == (2048, 8)
    far, others = asked("decode_attention")
    unknown = TritonRanker(model)(far, others, 0)
    assert unknown is not None and unknown.unknown and "out of distribution" in unknown.unsure


def test_level_0_orders_and_is_never_sure() -> None:
    assert shipped_model() is None  # nothing was measured on a GPU yet
    for name in FAMILIES:
        told, every = asked(name)
        found = TritonRanker()(told, every, 0)
        assert found is not None and found.unsure == UNMEASURED and not found.unknown
        assert sorted(found.order) == list(range(len(every)))
    assert TritonRanker()(Problem("gemv cpu", "", {}, ""), [], 0) is None
    assert TritonRanker()(Problem("merge_lse triton", "", {}, ""), [], 0) is None


def test_level_0_leaves_the_default_where_nothing_is_measured() -> None:
    x, weight = torch.randn(1, 64), torch.randn(40, 64)
    with tuning(Tuning("model", TritonRanker())) as how:
        torch.testing.assert_close(gemv(x, weight), gemv_reference(x, weight), atol=1e-4, rtol=1e-4)
    (choice,) = how.choices.values()
    assert choice.config.block_k == 1024 and UNMEASURED in choice.reason


def test_what_the_compiler_said_is_known() -> None:
    """Configurations that spill are not among the first, although their tiles promise most."""
    known = known_resources()
    assert len(known) > 500 and all(0 < one.registers <= 255 for one in known.values())
    told, every = problem_of(FAMILIES["gemv_row"], 0)
    kind = ("gemv", 2, told.shape["weight_bytes"], 0, 0, True)
    spilled = [known[kind, json.dumps(asdict(c))].spilled_bytes for c in every]
    found = TritonRanker()(told, every, 0)
    assert any(spilled) and found is not None
    assert not any(spilled[at] for at in found.order[:10])


def test_what_does_not_fit_comes_last_whatever_a_model_says(data: TritonData) -> None:
    told, every = asked("prefill_attention")
    model = fit(data)
    plain_order = TritonRanker(model)(told, every, 0)
    small = TritonRanker(model, "cuda:sm_86")(told, every, 0)  # 100 KiB of shared memory
    assert plain_order is not None and small is not None
    known = known_resources()
    kind = ("prefill_attention", 2, 2, 64, 0, False)
    shared = [known[kind, json.dumps(asdict(c))].shared_bytes for c in every]
    large = [at for at, size in enumerate(shared) if size + 1024 > 102400]
    assert large and set(small.order[-len(large) :]) == set(large)


def test_a_device_is_known_by_its_name() -> None:
    h200 = gpu_of("NVIDIA H200 multiprocessors=132", "cuda:sm_80")
    assert h200 == GPUS["cuda:sm_90"]
    assert gpu_of("NVIDIA A100-SXM4-40GB multiprocessors=108") == GPUS["cuda:sm_80"]
    assert gpu_of("something multiprocessors=46", "cuda:sm_89").multiprocessors == 46
    assert gpu_of("interpreter") == GPUS["cuda:sm_90"]
    with pytest.raises(ConfigError, match="target"):
        TritonRanker(target="cuda:sm_1")
    with pytest.raises(ConfigError, match="operator"):
        launch_seconds("merge_lse")


def test_triton_autotuner_prunes_by_the_estimate(data: TritonData) -> None:
    """Triton's own tuner, on arguments of a real launch; only its timing is left out."""
    triton = pytest.importorskip("triton")
    runtime = pytest.importorskip("triton.runtime.autotuner")
    names = ("gate", "up", "out", "width", "gate_row", "up_row", "out_row")
    wide = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    values = (wide, wide, wide, 4096, 4096, 4096, 4096)
    every = [
        triton.Config({"BLOCK": c.block}, num_warps=c.num_warps)
        for c in GATED_ACTIVATION.candidates(FAMILIES["gated_activation"].describe({}))
    ]
    default = {"BLOCK": 1024, "num_warps": 4}
    for model in (None, fit(data)):
        seconds = launch_seconds("gated_activation", model)
        pruned = prune_configs_by(seconds, default, top_k=3)

        def kernel(gate: Any, BLOCK: int) -> None: ...

        tuner = runtime.Autotuner(
            kernel, list(names), every, [], None, None, prune_configs_by=pruned
        )
        tuner.nargs = dict(zip(names, values, strict=True))
        left = tuner.prune_configs({})
        assert len(left) == 3
        assert any(c.kwargs["BLOCK"] == 1024 and c.num_warps == 4 for c in left)
        if model is not None:
            assert any(c.kwargs["BLOCK"] == 2048 and c.num_warps == 8 for c in left)
    assert launch_seconds("gemv")({"rows": 1}) is None  # a parameter is missing
