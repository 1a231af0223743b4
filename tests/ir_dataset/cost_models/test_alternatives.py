"""The model of whole alternatives: learned from made-up times, stored, judged; and the one shipped."""

from __future__ import annotations

import gzip
import json
from itertools import product

import pytest
import torch

pytest.importorskip("lightgbm")
pytest.importorskip("pyarrow")

from ir_dataset.cost_models import alternatives_data, stored
from ir_dataset.cost_models.alternatives import NAMES, LearnedModel, Settings, as_run, features
from ir_dataset.cost_models.alternatives_data import AlternativesData, Row, decisions
from ir_dataset.cost_models.alternatives_evaluate import evaluate, judge, summary
from rewriter.cost.cost import Cost
from rewriter.cost.model import Estimate, Prediction, compare
from rewriter.cost.roofline import Ceilings
from rewriter.cost.work import SIZES, Work, linear_work
from rewriter.engine.cached_attention import AttentionShape
from rewriter.errors import ArtifactError, ConfigError

CEILINGS = Ceilings("made up", 2, bandwidth=10e9, flops=100e9, overhead=1e-6)
SMALL = Settings(members=3, trees=40, leaves=8, rate=0.2)
EXTENTS = (64, 128, 256, 512, 1024)


def made_up() -> AlternativesData:
    """int8 rows take half of the time of others on `cpu`, and twice on `eager`."""
    rows = []
    for (out_size, in_size), dtype, backend in product(
        product(EXTENTS, EXTENTS), ("float32", "int8"), ("eager", "cpu")
    ):
        work = linear_work(1, out_size, in_size, "float32", dtype)
        wide = CEILINGS.seconds(linear_work(1, out_size, in_size, "float32", "float32"))
        seconds = wide * {"float32": 1.5, "int8": 0.75 if backend == "cpu" else 3.0}[dtype]
        name = f"{out_size}x{in_size}"
        rows.append(
            Row(f"linear float32 {name}", f"linear {name}", work, backend, 2, seconds, seconds)
        )
    return AlternativesData(tuple(rows), {2: CEILINGS}, {}, "digest")


DATA = made_up()


@pytest.fixture(scope="module")
def model() -> LearnedModel:
    return LearnedModel.fit(DATA, settings=SMALL)


def test_decides_what_it_was_shown(model):
    wide, narrow = (linear_work(1, 384, 320, "float32", dtype) for dtype in ("float32", "int8"))
    assert compare(model, [wide], [narrow], "eager").slower
    faster = compare(model, [wide], [narrow], "cpu")
    assert faster.high < 1 and not faster.unsure


def test_says_what_it_has_not_seen(model):
    known = linear_work(1, 384, 320, "float32", "float32")
    assert not model.estimate(known, "cpu").unsure
    for work, backend, reason in (
        (linear_work(1, 384, 320, "bfloat16", "bfloat16"), "cpu", "never saw linear cpu bfloat16"),
        (known, "inductor", "never saw linear inductor"),
        (Work("conv", Cost(1e6, 1e6, 1)), "cpu", "never saw conv cpu"),
        (Work("", Cost(1e6, 1e6, 1)), "cpu", "never saw"),
        (linear_work(1, 65536, 320, "float32", "float32"), "cpu", "out_size=65536"),
        (linear_work(64, 384, 320, "float32", "float32"), "cpu", "rows=64"),
    ):
        found = model.estimate(work, backend)
        assert reason in found.unsure and found.low <= found.seconds <= found.high
    elsewhere = model.at(Ceilings("another", 2, 1e10, 1e11, 1e-6))
    assert "learned on made up" in elsewhere.estimate(known, "cpu").unsure
    assert (
        "8 threads"
        in model.at(Ceilings("made up", 8, 1e10, 1e11, 1e-6)).estimate(known, "cpu").unsure
    )


def test_same_data_same_bytes(model, tmp_path):
    model.save(tmp_path / "one.json.gz")
    LearnedModel.fit(DATA, settings=SMALL).save(tmp_path / "two.json.gz")
    assert (tmp_path / "one.json.gz").read_bytes() == (tmp_path / "two.json.gz").read_bytes()
    read = LearnedModel.load(tmp_path / "one.json.gz", CEILINGS)
    work = linear_work(1, 384, 320, "float32", "int8")
    assert read.estimate(work, "cpu") == model.estimate(work, "cpu")
    assert read.training_data == "digest"


def test_damage_is_found(model, tmp_path):
    path = tmp_path / "model.json"
    model.save(path)
    document = json.loads(path.read_text())
    for changed, reason in (
        ({"parameters": {}}, "damaged"),
        ({"kind": "ranking"}, "damaged"),
        ({"format": 9}, "format"),
    ):
        path.write_text(json.dumps({**document, **changed}))
        with pytest.raises(ArtifactError, match=reason):
            LearnedModel.load(path, CEILINGS)
    path.write_text(json.dumps(document)[:-100])
    with pytest.raises(ArtifactError, match="cannot be read"):
        LearnedModel.load(path, CEILINGS)
    with pytest.raises(ArtifactError, match="cannot be read"):
        LearnedModel.load(tmp_path / "none.json", CEILINGS)
    other = stored.StoredModel("alternatives", NAMES[:-1], {"members": ()}, {}, "")
    stored.save(other, path)
    with pytest.raises(ArtifactError, match="other features"):
        LearnedModel.load(path, CEILINGS)
    text = tmp_path / "text.json.gz"
    text.write_bytes(gzip.compress(b"[]"))
    with pytest.raises(ArtifactError, match="format"):
        LearnedModel.load(text, CEILINGS)


def test_cpp_has_one_attention():
    shape = AttentionShape(16, 4, 64, 64, torch.bfloat16)
    repeated, grouped = (shape.decode_work(op, 256, 2) for op in ("attention", "grouped_attention"))
    assert repeated.cost != grouped.cost and as_run(repeated, "cpu") == grouped
    assert as_run(repeated, "eager") == repeated and as_run(grouped, "cpu") == grouped


def test_one_shape_is_too_few():
    with pytest.raises(ConfigError, match="at least 2"):
        LearnedModel.fit(DATA, [r for r in DATA.rows if r.shape == DATA.rows[0].shape])


def test_features_by_hand():
    work = linear_work(1, 256, 64, "float32", "int8")
    told = dict(zip(NAMES, features(work, "cpu", CEILINGS), strict=True))
    wanted = {"log_out_size": 8, "log_in_size": 6, "log_kv_len": -1, "weight_bytes": 1, "is_cpu": 1}
    assert {name: told[name] for name in wanted} == wanted


def test_decisions_are_what_passes_and_backends_exchange():
    kinds = [d.kind for d in decisions(DATA.rows)]
    sites = len(EXTENTS) ** 2
    assert kinds.count("int8 weights") == 2 * sites and kinds.count("cpu, not eager") == 2 * sites
    assert len(kinds) == 4 * sites


def test_judged_by_the_other_pass():
    decision = next(d for d in decisions(DATA.rows) if d.kind == "int8 weights")
    assert DATA.rows[decision.before].backend == "eager"
    assert judge(DATA, decision, True).slowdown == pytest.approx(2)
    assert judge(DATA, decision, False).slowdown == 1
    told = Prediction.of(Estimate(1, 0.9, 1.1), Estimate(3, 2, 4), model="", backend="eager")
    outcome = judge(DATA, decision, told)
    assert outcome.slowdown == outcome.as_used == 1 and outcome.covered
    unsure = Prediction.of(Estimate(1, 0.1, 9), Estimate(3, 2, 4), model="", backend="eager")
    outcome = judge(DATA, decision, unsure)
    assert outcome.slowdown == 1 and outcome.as_used == pytest.approx(2) and outcome.unsure
    assert summary([outcome])["correct"] == 1


def test_evaluation_beats_always_where_there_is_something_to_learn():
    rows = evaluate(DATA, range(2), SMALL)
    found = {r["selector"]: r for r in rows if r["decision"] == "int8 weights"}
    learned = found["learned, held-out shape"]
    assert learned["correct"] > 0.95 and found["measured before"]["correct"] == 1
    assert found["always apply"]["correct"] == found["always leave"]["correct"] == 0.5
    assert learned["slowdown"] < 1.05 < found["roofline"]["slowdown"]
    operator = found["learned, held-out operator"]
    assert operator["unsure"] == 1  # int8 rows were never seen


def test_rows_are_written_and_read(tmp_path):
    row = {
        "site": "linear float32 64x32 rows=1",
        "operator": "linear",
        "backend": "cpu",
        "dtype": "float32",
        "weight_dtype": "int8",
        "threads": 2,
        **dict.fromkeys(SIZES, 0),
        "rows": 1,
        "out_size": 64,
        "in_size": 32,
        "flops": 4096.0,
        "bytes_moved": 2688.0,
        "launches": 1,
        "seconds_1": 2e-6,
        "seconds_2": 3e-6,
        "median_1": 0.1,
        "median_2": 0.1,
    }
    path = tmp_path / "alternatives_2.parquet"
    told = {"processor": "made up", "ceilings": json.dumps(vars(CEILINGS))}
    alternatives_data.write([row], told, path)
    read = alternatives_data.load([path])
    assert read.ceilings == {2: CEILINGS} and read.machine == {"processor": "made up"}
    (found,) = read.rows
    assert found.shape == "linear 64x32" and found.work.sizes == {
        "rows": 1,
        "out_size": 64,
        "in_size": 32,
    }
    assert (found.seconds, found.judged) == pytest.approx((2e-6, 3e-6))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="cannot be read"):
        alternatives_data.load([path])
    with pytest.raises(ArtifactError, match="there are none"):
        alternatives_data.load([])


def test_shipped_model_goes_with_its_data():
    data, path = alternatives_data.load(), stored.shipped("alternatives")
    model = LearnedModel.load(path, next(iter(data.ceilings.values())))
    assert model.training_data == data.digest and model.learned_on == data.ceilings
    for row in data.rows[::40]:
        told = model.at(data.ceilings[row.threads]).estimate(row.work, row.backend)
        assert not told.unsure and 0.2 < told.seconds / row.seconds < 5


def test_shipped_model_knows_that_grouped_heads_pay():
    data = alternatives_data.load()
    model = LearnedModel.load(ceilings=next(iter(data.ceilings.values())))
    shape = AttentionShape(16, 4, 64, 64, torch.bfloat16)
    works = ([shape.decode_work(op, 1024)] for op in ("attention", "grouped_attention"))
    told = compare(model, *works, "eager")
    assert told.high < 1 and not told.unsure
