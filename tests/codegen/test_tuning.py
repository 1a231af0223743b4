"""The one rule for configurations: what is measured, what is kept, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from codegen.cpp_kernels.gathered_mlp import gathered_mlp
from codegen.cpp_kernels.gathered_mlp import reference as mlp_reference
from codegen.cpp_kernels.gemv import gemv, reference
from codegen.cpp_kernels.sweep import DEFAULT, SweepConfig, candidates
from codegen.tuning import Problem, Ranked, Tuning, choose, current, prune_configs_by, tuning
from rewriter.errors import ConfigError
from tests.codegen.cpp_kernels.running import needs_compiler
from tests.codegen.tolerances import assert_near

PROBLEM = Problem("gemv cpu", "text", {"rows": 8, "columns": 8}, "here threads=2")
FAST, SLOW = SweepConfig(rows=2), SweepConfig(rows=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))


class Timer:
    """Seconds of configurations, and which were asked for."""

    def __init__(self, fast: float = 1.0) -> None:
        self.fast, self.asked = fast, []

    def __call__(self, config: SweepConfig) -> float:
        self.asked.append(config)
        return {FAST: self.fast, DEFAULT: 2.0}.get(config, 3.0)


class Model:
    """Ranks positions as told."""

    def __init__(self, answer: Ranked | None) -> None:
        self.answer = answer

    def __call__(self, problem: Problem, offered: Sequence[Any], default: int) -> Ranked | None:
        assert offered[default] == DEFAULT
        return self.answer


def test_default_outside_and_in_default_mode() -> None:
    timer = Timer()
    assert choose(PROBLEM, [FAST], DEFAULT, timer) == DEFAULT and current() is None
    with tuning(Tuning()):
        assert choose(PROBLEM, [FAST], DEFAULT, timer) == DEFAULT
    assert timer.asked == []


def test_measures_all_and_keeps_it() -> None:
    timer = Timer()
    for _ in range(2):  # the second time nothing is left in memory, only on disk
        with tuning(Tuning("measure")) as how:
            assert choose(PROBLEM, [SLOW, FAST], DEFAULT, timer) == FAST
            assert choose(PROBLEM, [SLOW, FAST], DEFAULT, timer) == FAST
    assert timer.asked == [DEFAULT, SLOW, FAST]
    (line,) = how.report()
    assert "2.00x the default's speed; 3 of 3 measured, all" in line and "rows=2" in line


def test_damaged_entry_is_measured_again(tmp_path: Path) -> None:
    timer = Timer()
    with tuning(Tuning("measure")):
        choose(PROBLEM, [FAST], DEFAULT, timer)
    (entry,) = tmp_path.glob("*.json")
    entry.write_text("{")
    with tuning(Tuning("measure")):
        assert choose(PROBLEM, [FAST], DEFAULT, timer) == FAST
    assert timer.asked == [DEFAULT, FAST] * 2


def test_another_device_or_text_is_another_problem() -> None:
    offered = [DEFAULT, FAST]
    keys = {
        PROBLEM.key(offered),
        PROBLEM.key([DEFAULT]),
        Problem("gemv cpu", "other", PROBLEM.shape, PROBLEM.device).key(offered),
        Problem("gemv cpu", "text", {"rows": 9, "columns": 8}, PROBLEM.device).key(offered),
        Problem("gemv cpu", "text", PROBLEM.shape, "there").key(offered),
    }
    assert len(keys) == 5


def test_the_default_stays_where_nothing_is_clearly_faster() -> None:
    with tuning(Tuning("measure")) as how:
        assert choose(PROBLEM, [FAST], DEFAULT, Timer(fast=1.99)) == DEFAULT
    assert "none is faster by 2 %" in how.report()[0]


def test_model_prunes_and_the_default_is_measured() -> None:
    timer = Timer()
    many = [*candidates(2)]
    at = 1 + [c for c in many if c != DEFAULT].index(FAST)
    order = (at, *(i for i in range(len(many)) if i != at))
    with tuning(Tuning("measure", ranker=Model(Ranked(order)), top_k=1)) as how:
        assert choose(PROBLEM, many, DEFAULT, timer) == FAST
    assert timer.asked == [DEFAULT, FAST]
    assert f"2 of {len(many)} measured" in how.report()[0]


@pytest.mark.parametrize("answer", [None, Ranked((1, 0), "far away", unknown=True)])
def test_unsure_model_measures_all_or_keeps_the_default(answer: Ranked | None) -> None:
    timer = Timer()
    with tuning(Tuning("measure", ranker=Model(answer), top_k=1)):
        choose(PROBLEM, [SLOW, FAST], DEFAULT, timer)
    assert timer.asked == [DEFAULT, SLOW, FAST]
    with tuning(Tuning("model", ranker=Model(answer))) as how:
        assert choose(PROBLEM, [SLOW, FAST], DEFAULT, timer) == DEFAULT
    assert ("far away" if answer else "does not know") in how.report()[0]


def test_unsure_of_the_first_still_prunes() -> None:
    timer = Timer()
    with tuning(Tuning("measure", ranker=Model(Ranked((2, 1, 0), "no agreement")), top_k=1)):
        assert choose(PROBLEM, [SLOW, FAST], DEFAULT, timer) == FAST
    assert timer.asked == [DEFAULT, FAST]


def test_model_alone_runs_nothing() -> None:
    timer = Timer()
    with tuning(Tuning("model", ranker=Model(Ranked((1, 0))))):
        assert choose(PROBLEM, [FAST], DEFAULT, timer) == FAST
    assert timer.asked == []


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("mode", {"mode": "guess"}),
        ("ranker", {"mode": "model"}),
        ("top_k", {"top_k": 0}),
    ],
)
def test_wrong_settings(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=field):
        Tuning(**arguments)


@pytest.mark.parametrize("knobs", [{"rows": 3}, {"ahead_bytes": 100}, {"threads": -1}])
def test_wrong_knobs(knobs: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        SweepConfig(**knobs)


@needs_compiler
def test_every_kind_of_configuration_gives_the_same_numbers() -> None:
    x, weight = torch.randn(1, 67), torch.randn(37, 67)
    gate, up, down = weight, torch.randn(37, 67), torch.randn(37, 21)
    kept = torch.tensor([3, 36, 0, 7, 20])
    some = [SweepConfig(1, 0), SweepConfig(4, 16384, 1)]
    chosen = Timer()
    for config in some:
        chosen.fast = 0.0

        def pick(problem: Problem, offered: Sequence[Any], default: int, c: Any = config) -> Ranked:
            return Ranked((offered.index(c),))

        with tuning(Tuning("model", ranker=pick)):
            assert_near(gemv(x, weight, threads=2), reference(x, weight))
            actual = gathered_mlp(x, gate, up, down, kept, activation="silu", threads=2)
            assert_near(actual, mlp_reference(x, gate, up, down, kept, activation="silu"))


def test_prune_configs_by_keeps_the_default() -> None:
    pruned = prune_configs_by(lambda v: v["BLOCK"] / 10, {"BLOCK": 99, "num_warps": 4}, top_k=2)
    told = {block: pruned["perf_model"](n=5, BLOCK=block, num_warps=4) for block in (8, 16, 99)}
    assert sorted(told, key=told.__getitem__)[: pruned["top_k"]] == [99, 8]
    with pytest.raises(ConfigError, match="top_k"):
        prune_configs_by(lambda v: 0.0, {}, top_k=1.5)


def test_triton_autotuner_takes_it() -> None:
    """Triton itself prunes by the model; only the timing is ours, as there may be no GPU."""
    triton = pytest.importorskip("triton")
    runtime = pytest.importorskip("triton.runtime.autotuner")
    configs = [triton.Config({"BLOCK": b}, num_warps=4) for b in (16, 32, 64, 128)]
    pruned = prune_configs_by(lambda v: 1.0 / v["BLOCK"], {"BLOCK": 16}, top_k=2)

    def kernel(n: int, BLOCK: int) -> None: ...

    tuner = runtime.Autotuner(
        kernel,
        ["n"],
        configs,
        ["n"],
        None,
        None,
        prune_configs_by=pruned,
        do_bench=lambda *_, **__: 0,
    )
    tuner.nargs = {"n": 8}
    kept = [c.kwargs["BLOCK"] for c in tuner.prune_configs({})]
    assert kept == [16, 128]
