"""`rewriter ir cost`: a module's functions get sizes, whatever is wrong with the module is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightgbm", reason="pip install 'rewriter[ir]'")
pytest.importorskip("llvmlite", reason="pip install 'rewriter[ir]'")
pytest.importorskip("pebble", reason="pip install 'rewriter[ir]'")

from typer.testing import CliRunner

from ir_dataset.cost_models.cli import app
from ir_dataset.cost_models.predict import load_size_models, predict_sizes
from ir_dataset.cost_models.size import SizeModel, SizeRows, SizeSettings
from ir_dataset.features import FEATURES
from ir_dataset.toolchain import Toolchain
from rewriter.errors import ArtifactError, ConfigError, SourceError

FIXTURES = Path(__file__).parents[1] / "fixtures"
C = "static int g(int x) { return x * x; }\nint f(int *p) { return g(p[0]) + g(p[1]); }\n"


def _rows(count=400):
    """Bytes are five times the instructions that are left at -Oz."""
    random = np.random.default_rng(0)
    features = random.poisson(6, (count, len(FEATURES))).astype(np.float32)
    left = features[:, FEATURES.index("oz_instructions")]
    projects = np.array([f"p{at % 7}" for at in range(count)])
    return SizeRows(features, FEATURES, 5.0 * left + 1.0, projects)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    model = SizeModel.fit(_rows(), SizeSettings(trees=5, leaves=7, members=1))
    model.save(place / "size_oz.json.gz")
    return place


def _run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_each_function_has_bytes_inside_their_interval(models):
    done = _run("predict", FIXTURES / "c.ll", "--models", models, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["functions"]
    assert [row["name"] for row in rows] == ["sum", "keys", "kind"]
    for row in rows:
        told = row["Oz"]
        assert 0 < told["low"] <= told["bytes"] <= told["high"]
        assert told["unsure"] in (True, False)


def test_a_table_for_people(models):
    done = _run("predict", FIXTURES / "c.ll", "--models", models)
    assert done.exit_code == 0 and "Oz bytes" in done.stdout and "keys" in done.stdout


def test_c_is_compiled_first(models, tmp_path):
    if Toolchain.find().c_compiler() is None:
        pytest.skip(Toolchain.find().why_no_c_compiler())
    (tmp_path / "a.c").write_text(C)
    found = predict_sizes(tmp_path / "a.c", load_size_models(models))
    assert sorted(found.names) == ["f", "g"]
    (tmp_path / "b.c").write_text("int f( {")
    with pytest.raises(SourceError, match=r"b\.c does not compile: .*error"):
        predict_sizes(tmp_path / "b.c", load_size_models(models))


def test_the_models_that_ship_know_the_size_of_plain_c(tmp_path):
    from ir_dataset.labels import label_module
    from ir_dataset.store import Store

    store = Store(tmp_path)
    labels = label_module(store, store.put((FIXTURES / "c.ll").read_bytes()), timeout_s=60)
    ways = {way.kind: dict(zip(way.names, way.sizes, strict=True)) for way in labels.sizes}
    found = predict_sizes(FIXTURES / "c.ll", load_size_models())
    assert set(found.answers) == {"Oz", "O2"}
    for kind, answer in found.answers.items():
        for name, size in zip(found.names, answer.size, strict=True):
            if name in ways.get(kind, {}):
                assert 0.4 < size / ways[kind][name] < 2.5, (kind, name)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.bc", b"BC\xc0\xde" + b"0" * 12, "cannot be read"),
        ("a.ll", b"define i32 @f( {", "cannot be read"),
        ("a.ll", b"@x = global i32 1", "defines no function"),
    ],
)
def test_what_is_no_module_is_told(models, tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=told):
        predict_sizes(tmp_path / name, load_size_models(models))


def test_files_and_models_that_are_not_there_are_named(models, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.ll"):
        predict_sizes(tmp_path / "nothing.ll", load_size_models(models))
    with pytest.raises(ConfigError, match="size_oz"):
        load_size_models(tmp_path)
    shutil.copy(models / "size_oz.json.gz", tmp_path / "size_o2.json.gz")
    (tmp_path / "size_oz.json.gz").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="size_oz"):
        load_size_models(tmp_path)
    assert _run("predict", tmp_path / "nothing.ll", "--models", models).exit_code == 2


def _dataset(place, split):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = _rows(120)
    columns = {
        "project": rows.projects.tolist(),
        "split": [split] * 120,
        "duplicate": [False] * 120,
        "size_oz": rows.sizes.astype(np.float32),
    }
    columns |= {f"feature_{name}": rows.features[:, at] for at, name in enumerate(FEATURES)}
    pq.write_table(pa.table(columns), place / "functions.parquet")


def test_models_are_judged_on_what_a_dataset_holds_out(models, tmp_path):
    _dataset(tmp_path, "test")
    done = _run("eval", tmp_path, "--models", models, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["Oz"]
    assert told["learned_from_this_dataset"] is False
    assert told["test"]["rows"] == 120 and told["test"]["mape"] < 0.3
    assert "another dataset" in _run("eval", tmp_path, "--models", models).stdout


def test_a_dataset_without_held_out_sizes_cannot_judge(models, tmp_path):
    _dataset(tmp_path, "train")
    done = _run("eval", tmp_path, "--models", models)
    assert done.exit_code == 2 and "no held-out function" in done.stderr
    assert _run("eval", tmp_path / "absent", "--models", models).exit_code == 2
