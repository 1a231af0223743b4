"""Ranking on times that follow a known rule, so that what is learned can be told from noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightgbm")

from ir_dataset.cost_models import stored
from ir_dataset.cost_models.evaluate import (
    folds,
    interval,
    judge_model,
    judge_scores,
    kendall,
    mean_slowdown,
    noise_floor,
    summary,
)
from ir_dataset.cost_models.ranking import Groups, RankingModel, Settings
from rewriter.errors import ArtifactError, ConfigError, InputError

NAMES = ("size", "tile", "threads")
SETTINGS = Settings(members=3, trees=40, leaves=8, ranker_weight=0.3, kernel_features=("size",))
DEFAULT = 2


def groups(sizes: list[float]) -> Groups:
    """Large sizes want large tiles and two threads; small ones the opposite."""
    rows = [(s, tile, threads) for s in sizes for tile in (1, 2, 4, 8) for threads in (1, 2)]
    features = np.array(rows, float)
    best = np.clip(features[:, 0] / 2, 0, 3)
    seconds = 2.0 ** features[:, 0] * (1 + 0.3 * np.abs(np.log2(features[:, 1]) - best))
    seconds *= np.where((features[:, 2] == 2) == (features[:, 0] > 3), 1.0, 1.5)
    return Groups(features, NAMES, np.repeat(np.arange(len(sizes)), 8), seconds)


DATA = groups([0.5 * i for i in range(14)])
MODEL = RankingModel.fit(DATA, SETTINGS, seed=1)


def test_ranks_a_size_between_known_ones() -> None:
    new = groups([1.25, 4.75])
    for group in (0, 1):
        rows = np.flatnonzero(new.groups == group)
        ranking = MODEL.rank(new.features[rows], default=DEFAULT)
        slower = new.seconds[rows][ranking.order[0]] / new.seconds[rows].min()
        assert slower < 1.1
        assert sorted(ranking.order) == list(range(8))
        assert np.all(ranking.low <= ranking.high)


def test_says_unsure_of_a_kind_that_lies_between_known_ones() -> None:
    features = np.hstack([DATA.features, DATA.groups[:, None] % 2 * 2.0])
    kinds = Groups(features, (*NAMES, "kind"), DATA.groups, DATA.seconds)
    settings = replace(SETTINGS, kernel_features=("size", "kind"), kind_features=("kind",))
    model = RankingModel.fit(kinds, settings, seed=1)
    rows = kinds.features[:8].copy()
    assert not model.rank(rows).far
    rows[:, 3] = 1.0
    answer = model.rank(rows)
    assert answer.far and "no kernel of this kind" in answer.unsure
    with pytest.raises(ConfigError, match="kind_features"):
        RankingModel.fit(DATA, replace(SETTINGS, kind_features=("tile",)), seed=1)


def test_says_unsure_far_from_what_is_known() -> None:
    far = groups([40.0])
    assert "out of distribution" in MODEL.rank(far.features, default=DEFAULT).unsure
    assert not MODEL.rank(groups([6.2]).features).unsure


def test_same_data_and_seed_give_the_same_model() -> None:
    again = RankingModel.fit(DATA, SETTINGS, seed=1)
    assert np.array_equal(again.rank(DATA.features[:8]).score, MODEL.rank(DATA.features[:8]).score)


def test_saves_as_text_and_reads_the_same(tmp_path: Path) -> None:
    for name in ("model.json", "model.json.gz"):
        path = tmp_path / name
        replace(MODEL, training_data="abc", metrics={"top1": 1.0}).save(path)
        read = RankingModel.load(path)
        first, second = (m.rank(DATA.features[:8], 0) for m in (MODEL, read))
        assert np.array_equal(first.score, second.score) and first.unsure == second.unsure
        assert (read.training_data, read.metrics, read.names) == ("abc", {"top1": 1.0}, NAMES)
        before = path.read_bytes()
        read.save(path)
        assert path.read_bytes() == before


def test_refuses_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    MODEL.save(path)
    content = json.loads(path.read_text())
    wrong = {
        "is damaged": {**content, "parameters": {**content["parameters"], "limit": 0}},
        "format 2": {**content, "format": 2},
        "cannot be read": "{",
        "format 'list'": [],
    }
    for told, change in wrong.items():
        path.write_text(change if isinstance(change, str) else json.dumps(change))
        with pytest.raises(ArtifactError, match=told):
            RankingModel.load(path)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="of kind 'ranking', wanted 'size'"):
        stored.load(path, "size")
    with pytest.raises(ArtifactError, match="cannot be read"):
        stored.load(tmp_path / "none.json", "size")
    with pytest.raises(ArtifactError, match="booster"):
        stored.boosters_of(["tree\nnonsense"])
    with pytest.raises(ConfigError, match="nothing of this name"):
        stored.shipped("nothing of this name")


def test_refuses_wrong_data() -> None:
    with pytest.raises(InputError, match="features"):
        MODEL.rank(np.zeros((2, 5)))
    with pytest.raises(InputError, match="seconds"):
        Groups(DATA.features, NAMES, DATA.groups, -DATA.seconds)
    with pytest.raises(InputError, match="groups"):
        Groups(DATA.features, NAMES, DATA.groups % 3, DATA.seconds)
    with pytest.raises(ConfigError, match="groups"):
        RankingModel.fit(groups([1.0]), SETTINGS)
    with pytest.raises(ConfigError, match="kernel_features"):
        RankingModel.fit(DATA, replace(SETTINGS, kernel_features=("none",)))


def test_folds_keep_what_they_should_apart() -> None:
    number = np.repeat(np.arange(12), 8)
    families = number // 4
    for kind, kept in (("shape", number), ("family", families)):
        masks = list(folds(kind, number, families, 3, 0))
        assert np.array_equal(sum(m.astype(int) for m in masks), np.ones(96))
        for mask in masks:
            assert not set(kept[mask]) & set(kept[~mask])
    shapes = next(folds("shape", number, families, 3, 0))
    assert set(families[shapes]) == {0, 1, 2}  # a part of each family
    leaky = next(folds("random", number, families, 3, 0))
    assert set(number[leaky]) & set(number[~leaky])


def test_judging() -> None:
    seconds = np.array([4.0, 1.0, 2.0, 1.5])
    judged = judge_scores(0, np.array([0.0, 2.0, 1.0, 3.0]), seconds, default=3)
    assert judged.slowdown == {1: 4.0, 3: 1.0, 5: 1.0}
    assert judged.with_default == {1: 1.5, 3: 1.0, 5: 1.0} and judged.default == 1.5
    assert judge_scores(0, seconds, seconds, 0).tau == 1.0
    assert kendall(-seconds, seconds) == -1.0 and kendall(np.zeros(4), seconds) == 0.0
    unsure = judge_scores(0, np.arange(4.0), seconds, 3, unsure=True)
    told = summary([judged, unsure])
    assert told["top1_or_default"] == pytest.approx(mean_slowdown([4.0, 1.5]))
    assert told["unsure_share"] == 0.5 and told["wrong"] == 0.5 and told["default_better"] == 0.5
    middle, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (middle, round(half, 3)) == (3.0, 1.963)


def test_held_out_shapes_beat_the_default() -> None:
    default = np.arange(len(DATA.groups)) % 8 == DEFAULT
    judged = []
    for held in folds("shape", DATA.groups, np.zeros(len(DATA.groups), int), 4, 0):
        judged += [j for j, _ in judge_model(DATA, DATA.seconds, held, default, SETTINGS, 0)]
    told = summary(judged)
    assert told["groups"] == 14 and told["top3"] < 1.1 < told["default"] and told["tau"] > 0.45
    perfect = summary(noise_floor(DATA, DATA.seconds, default))
    assert perfect["top1"] == 1.0 and perfect["tau"] == pytest.approx(1.0)
