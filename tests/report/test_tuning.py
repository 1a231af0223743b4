"""What was tuned while a model was optimized stands in its report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton comes for Linux alone")

from codegen.tuning import Problem, Ranked, Tuning, choose, tuning, tuning_lines
from rewriter import OptimizedModel, Report, optimize
from rewriter.report.html import render_html
from rewriter.report.json import report_from_json
from tests.tiny import tiny_causal_lm

PROBLEM = Problem("gemv triton", "text", {"rows": 1}, "interpreter")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWRITER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def last(problem: Problem, offered: Sequence[Any], default: int) -> Ranked | None:
    """Knows products alone."""
    return Ranked((len(offered) - 1,)) if problem.kernel == "gemv triton" else None


@pytest.fixture(scope="module")
def optimized() -> tuple[OptimizedModel, Tuning]:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}
    with tuning(Tuning("model", last)) as how:
        return optimize(tiny_causal_lm("llama", **sizes), passes=[], backend="triton"), how


def test_every_choice_is_told_with_its_reason(optimized: tuple[OptimizedModel, Tuning]) -> None:
    report, how = optimized[0].report, optimized[1]
    assert report.tuning == how.report()
    products = [line for line in report.tuning if line.startswith("gemv triton")]
    assert products and all("model: first of its order" in line for line in products)
    others = [line for line in report.tuning if line not in products]
    assert any(line.startswith("rms_norm triton") for line in others)
    assert all("default: the model does not know this kernel" in line for line in others)


def test_text_json_and_html_have_them(optimized: tuple[OptimizedModel, Tuning]) -> None:
    report = optimized[0].report
    line = report.tuning[0]
    assert f"\ntuning\n  {line}" in str(report)
    stored = json.loads(json.dumps(report.to_json()))
    assert stored["tuning"] == report.tuning == report_from_json(stored).tuning
    assert "gemv triton" in render_html(report)
    del stored["tuning"]  # as versions before this one wrote it
    assert report_from_json(stored).tuning == []


def test_they_travel_with_the_saved_model(
    optimized: tuple[OptimizedModel, Tuning], tmp_path: Path
) -> None:
    optimized[0].save(tmp_path / "saved")
    (found,) = (tmp_path / "saved").rglob("report.json")
    assert json.loads(found.read_text())["tuning"] == optimized[0].report.tuning


def test_lines_are_of_what_was_asked_in_the_block() -> None:
    outside, first, second, third = [], [], [], []
    with tuning_lines(outside):
        choose(PROBLEM, [2], 1, lambda _: 1.0)  # type: ignore[type-var]
    with tuning(Tuning("model", last)) as how:
        with tuning_lines(first):
            assert choose(PROBLEM, [2], 1, lambda _: 1.0) == 2  # type: ignore[type-var]
        with tuning_lines(second):  # nothing new is chosen, but it is asked for
            choose(PROBLEM, [2], 1, lambda _: 1.0)  # type: ignore[type-var]
        with tuning_lines(third):
            pass
    assert outside == [] and first == second == how.report()
    assert third == ["no kernel asked for a configuration (mode model)"]


def test_without_tuning_nothing_is_said() -> None:
    report = Report("model")
    assert report.tuning == [] and "tuning" not in str(report)
