"""Sums over the work done: found again where times are such sums, and never from a row's own group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("pyarrow")

from ir_dataset.cost_models import work_terms
from ir_dataset.cost_models.cpu_families import FAMILIES
from ir_dataset.cost_models.cpu_features import CODE, KERNEL, NAMES, configuration_features
from ir_dataset.cost_models.cpu_loops import CONFIGURATIONS, DEFAULT, Shape
from ir_dataset.cost_models.ranking import Groups

SAME = (*KERNEL[:4], "rows", "unroll", "width", "block", "prefetch", "threads")
NO_CODE = dict.fromkeys(CODE, 1.0)
FEW = (DEFAULT, next(c for c in CONFIGURATIONS if c.threads == 1 and c.width == 8 and c.block))


def groups(name: str, shapes: list[Shape], first: int = 0) -> Groups:
    """Each shape in each of `FEW`, in seconds that are 1 µs + 3 ns a tile + 0.1 ns a cell."""
    rows = [
        [configuration_features(FAMILIES[name], shape, c, NO_CODE)[n] for n in NAMES]
        for shape in shapes
        for c in FEW
    ]
    features = np.array(rows, float)
    terms = work_terms.work_terms(features, NAMES)
    seconds = 1e-6 + 3e-9 * terms[:, 1] + 1e-10 * terms[:, 3]
    return Groups(features, NAMES, first + np.arange(len(rows)) // len(FEW), seconds)


SHAPES = ((64, 256), (512, 64), (128, 1024), (16, 512), (256, 128), (1024, 320))
KNOWN = groups("gemv", [Shape(*shape) for shape in SHAPES])


def test_finds_a_sum_again_far_from_what_was_measured() -> None:
    asked = groups("gemv", [Shape(4096, 64), Shape(8, 8192)], first=100)
    told = work_terms.predicted_logs(asked, KNOWN, SAME)
    assert np.allclose(told, np.log(asked.seconds), atol=0.02)


def test_a_group_says_nothing_of_itself() -> None:
    wrong = KNOWN.seconds.copy()
    wrong[: len(FEW)] *= 50
    changed = replace(KNOWN, seconds=wrong)
    told = work_terms.predicted_logs(changed, changed, SAME)
    assert np.allclose(told[: len(FEW)], np.log(KNOWN.seconds[: len(FEW)]), atol=0.05)


def test_nothing_is_told_of_other_kernels_or_from_few_shapes() -> None:
    other = groups("column_sums", [Shape(64, 256)], first=100)
    assert np.isnan(work_terms.predicted_logs(other, KNOWN, SAME)).all()
    few = KNOWN.chosen(np.flatnonzero(KNOWN.groups < work_terms.LEAST_SHAPES))
    assert np.isnan(work_terms.predicted_logs(few, few, SAME)).all()


def test_stores_down_columns_meet_in_a_few_sets() -> None:
    def misses(rows: int) -> dict[str, float]:
        found = configuration_features(FAMILIES["transpose"], Shape(rows, 256), DEFAULT, NO_CODE)
        return {name: found[name] for name in work_terms.MISSES}

    page, odd = misses(1024), misses(1040)
    assert misses(16)["shared_lines"] == 1.0 and misses(32)["shared_lines"] == 0.0
    assert page["misses_first_cache"] > 0.9 > odd["misses_first_cache"]
    assert page["lines_on_a_set"] == 15.0 and odd["lines_on_a_set"] < 1.0
    plain = configuration_features(FAMILIES["gemv"], Shape(1024, 256), DEFAULT, NO_CODE)
    assert all(plain[name] == 0.0 for name in work_terms.MISSES)
