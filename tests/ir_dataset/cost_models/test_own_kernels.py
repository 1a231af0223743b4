"""The ranker of the project's own kernels, as it comes with the package."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("lightgbm")
pytest.importorskip("pyarrow")

from codegen.cpp_kernels.sweep import DEFAULT, SweepConfig, candidates
from codegen.tuning import Problem
from ir_dataset.cost_models import own_kernels
from ir_dataset.cost_models.own_kernels import NAMES, SweepRanker, config_of, features, problems


def problem(kernel: str = "gemv cpu", rows: int = 2048) -> Problem:
    shape = {"rows": rows, "columns": 768, "vectors": 1, "element_bytes": 4, "weight_bytes": 4}
    return Problem(kernel, "text", shape, "here threads=2")


def test_shipped_model_goes_with_its_data() -> None:
    data, ranker = own_kernels.load(), SweepRanker()
    assert ranker.model.training_data == data.digest and ranker.model.names == NAMES
    assert len(data.names) == len(list(problems())) and data.default.sum() == len(data.names)
    assert set(data.configs) == {DEFAULT, *candidates(2)}


def test_ranks_known_kernels_and_no_others() -> None:
    ranker, offered = SweepRanker(), [DEFAULT, *(c for c in candidates(2) if c != DEFAULT)]
    ranked = ranker(problem(), offered, 0)
    assert ranked is not None and sorted(ranked.order) == list(range(len(offered)))
    assert not ranked.unknown
    huge = ranker(problem(rows=2**26), offered, 0)
    assert huge is not None and huge.unknown and "out of distribution" in huge.unsure
    assert ranker(problem("decode_attention cpu"), offered, 0) is None


def test_features_tell_what_a_configuration_does() -> None:
    told = dict(
        zip(NAMES, features("gemv cpu", problem().shape, SweepConfig(4, 1024, 1), 2), strict=True)
    )
    wanted = {
        "log_bytes": np.log2(2048 * 768 * 4),
        "most_rows": 4,
        "threads": 1,
        "ahead_of_row": 256,
    }
    assert {name: told[name] for name in wanted} == pytest.approx(wanted)
    four = features("gemv cpu", {**problem().shape, "vectors": 8}, SweepConfig(8), 2)
    assert four[NAMES.index("most_rows")] == 2  # sums have to stay in registers
    gathered = {**problem().shape, "kept": 512, "out_size": 768}
    least = features("gathered_mlp cpu", gathered, SweepConfig(), 2)
    assert least[NAMES.index("log_bytes")] == pytest.approx(np.log2(512 * 768 * 4 * 3))


def test_configuration_from_its_text() -> None:
    for config in candidates(2):
        assert config_of(repr(config)) == config
