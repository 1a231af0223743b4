"""The whole pipeline on checked-in IR: no network, no compiler; killed, resumed, and the same bytes."""

import hashlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("pyarrow", "llvmlite", "msgspec", "pebble"):
    pytest.importorskip(needed, reason="pip install 'rewriter[ir]'")

import pyarrow.parquet as pq  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
TIMED = {"run.json", "card.html"}
"""Files that hold times."""
LANGUAGES = ("c", "cpp", "fortran", "rust", "zig")


def _corpus(place):
    text = 'name = "fixtures"\n'
    for language in LANGUAGES:
        folder = place / "sources" / language
        folder.mkdir(parents=True)
        (folder / f"{language}.ll").write_bytes((FIXTURES / f"{language}.ll").read_bytes())
        text += f'\n[[source]]\nkind = "local-tree"\npath = "sources/{language}"\n'
        text += f'language = "{language}"\nlicense = "MIT"\n'
    (place / "corpus.toml").write_text(text)
    return place / "corpus.toml"


def _command(config, store, output, *more):
    run = [
        sys.executable,
        "-m",
        "rewriter",
        "ir",
        "run",
        "--config",
        str(config),
    ]
    return [*run, "--store", str(store), "--output", str(output), "--jobs", "1", *more]


def _run(*arguments):
    return subprocess.run(
        _command(*arguments), capture_output=True, text=True, timeout=240, check=False
    )


def _hashes(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in TIMED
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    place = tmp_path_factory.mktemp("corpus")
    config = _corpus(place)
    done = _run(config, place / "store", place / "out")
    assert done.returncode == 0, done.stderr
    return place


def test_every_module_becomes_a_row_with_its_bitcode(packed):
    tables = [pq.read_table(path) for path in sorted((packed / "out" / "data").rglob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    assert sorted(row["language"] for row in rows) == sorted(LANGUAGES)
    for row in rows:
        assert hashlib.sha256(row["content"]).hexdigest() == row["module_id"]
        assert row["license_expression"] == "MIT"
        assert row["n_tokens_bpe"] > row["n_instructions"]
    assert {row["split"] for row in rows if row["language"] == "zig"} == {"ood"}


def test_functions_have_features_and_sizes(packed):
    table = pq.read_table(packed / "out" / "functions.parquet")
    assert table["feature_blocks"].null_count == 0
    assert any(size for size in table["size_o2"].to_pylist())
    assert len(table["ir2vec"][0]) == 75


def test_a_card_is_drawn_and_too_few_labels_train_nothing(packed):
    assert "data:image/png;base64," in (packed / "out" / "card.html").read_text()
    assert "configs:" in (packed / "out" / "README.md").read_text()
    models = json.loads((packed / "out" / "models.json").read_text())
    assert "below 50" in models["Oz"].get("reason", "below 50")
    assert "below 50" in models["O2"]["reason"]


def test_the_audit_is_published_and_clean(packed):
    audit = json.loads((packed / "out" / "audit.json").read_text())
    assert audit["clean"] is True
    assert all(one["same_norm_hash"] == 0 for one in audit["sets"])


def test_killed_runs_go_on_and_give_the_same_bytes(packed):
    config, chance = packed / "corpus.toml", random.Random(1)
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(
            _command(config, packed / "other", packed / "again"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(chance.uniform(0.5, 4.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed
    assert _run(config, packed / "other", packed / "again").returncode == 0
    assert _hashes(packed / "again") == _hashes(packed / "out")


def test_a_second_run_does_nothing_twice(packed):
    done = _run(packed / "corpus.toml", packed / "store", packed / "second", "--json")
    stages = {one["stage"]: one for one in json.loads(done.stdout)["stages"]}
    for name in ("fetch", "build", "verify", "license", "featurise", "label", "encode"):
        assert stages[name]["reused"] == stages[name]["total"], name
    assert _hashes(packed / "second") == _hashes(packed / "out")


def test_a_damaged_module_is_recorded_and_the_rest_goes_on(packed, tmp_path):
    config = _corpus(tmp_path)
    (tmp_path / "sources" / "c" / "damaged.bc").write_bytes(b"BC\xc0\xde" + bytes(100))
    done = _run(config, tmp_path / "store", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dedup"]["modules_kept"] == len(LANGUAGES)
    assert summary["dedup"]["units_unread"] + len(summary["unit_failures"]) == 1


def test_a_package_without_a_licence_is_left_out(tmp_path):
    config = _corpus(tmp_path)
    text = config.read_text().replace('language = "c"\nlicense = "MIT"\n', 'language = "c"\n')
    config.write_text(text)
    done = _run(config, tmp_path / "store", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "data" / "c").exists()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["tiers"]["c"] == {"none": 1}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--until", "polish"), "until='polish'"),
        (("--jobs", "-1"), "jobs=-1"),
        (("--executor", "slurm"), "executor='slurm'"),
        (("--budget-s", "-1"), "budget-s=-1"),
    ],
)
def test_bad_options_are_named(packed, tmp_path, arguments, told):
    done = _run(packed / "corpus.toml", tmp_path / "store", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
