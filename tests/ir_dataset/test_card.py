"""A card has a picture for what the dataset has numbers of, and says what is damaged."""

import base64
import json
import re

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pip install 'rewriter[ir]'")
pytest.importorskip("matplotlib", reason="pip install 'rewriter[ir]'")

from typer.testing import CliRunner

from ir_dataset.card_plots import OPCODE_GROUPS, draw_plots
from ir_dataset.cli import app
from ir_dataset.instruction_classes import CLASSES
from rewriter.errors import ArtifactError

COUNTS = {"units": 3, "functions": 9, "kept_modules": 2, "kept_functions": 6, "unique_functions": 4}
SUMMARY = {
    "name": "tiny",
    "languages": {"c": COUNTS, "zig": COUNTS},
    "tiers": {"c": {"a": 2, "none": 1}, "zig": {"b": 3}},
    "tokens": {"tokens": 0, "chars": 0},
    "dedup": {"modules_kept": 4},
    "units": 6,
    "packages_built": 2,
    "packages_complete": 2,
    "packages": [],
    "unit_failures": [],
    "sources_skipped": {},
    "toolchain": "x",
}


def _dataset(place, *, features=True):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for language in ("c", "zig"):
        folder = place / "data" / language
        folder.mkdir(parents=True)
        modules = {
            "language": [language] * 2,
            "license_expression": ["MIT", "Zlib"],
            "n_tokens_bpe": pa.array([400, None], pa.int64()),
        }
        pq.write_table(pa.table(modules), folder / "train-00000.parquet")
    functions = {
        "language": ["c"] * 3 + ["zig"] * 3,
        "n_instructions": [4, 9, 30, 2, 7, 100],
        "size_oz": pa.array([8.0, None, 90.0, 3.0, None, None], pa.float32()),
    }
    if features:
        functions |= {f"feature_{name}": np.ones(6, np.float32) for name in CLASSES}
    pq.write_table(pa.table(functions), place / "functions.parquet")
    (place / "summary.json").write_text(json.dumps(SUMMARY))
    audit = {"clean": True, "train_modules": 4, "train_functions": 6, "sets": [], "control": []}
    (place / "audit.json").write_text(json.dumps(audit))
    return place


def test_every_picture_is_drawn_into_the_page(tmp_path):
    done = CliRunner().invoke(app, ["stats", str(_dataset(tmp_path))])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "card.html").read_text()
    titles = re.findall(r'<img alt="([^"]+)"', page)
    assert len(titles) == 8
    for wanted in ("Duplicate", "Machine code", "Tokens", "Instructions", "Licences"):
        assert any(title.startswith(wanted) for title in titles), wanted
    for picture in re.findall(r"base64,([^\"]+)", page):
        assert base64.b64decode(picture).startswith(b"\x89PNG")


def test_pictures_without_numbers_are_left_out(tmp_path):
    plots = draw_plots(_dataset(tmp_path, features=False), SUMMARY)
    assert "Instructions, as written" not in [plot["title"] for plot in plots]
    assert len(plots) == 7


def test_pictures_show_the_numbers(tmp_path):
    """Another count of loads is another picture of instructions, and all others are the same bytes."""
    place = _dataset(tmp_path)
    before = {plot["title"]: plot["png"] for plot in draw_plots(place, SUMMARY)}
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(place / "functions.parquet")
    at = table.column_names.index("feature_load")
    changed = table.set_column(at, "feature_load", pa.array(np.full(6, 9, np.float32)))
    pq.write_table(changed, place / "functions.parquet")
    after = {plot["title"]: plot["png"] for plot in draw_plots(place, SUMMARY)}
    assert {title for title in before if before[title] != after[title]} == {
        "Instructions, as written"
    }


def test_groups_are_of_known_classes_and_none_twice():
    names = [name for group in OPCODE_GROUPS.values() for name in group]
    assert set(names) <= set(CLASSES) and len(names) == len(set(names))


@pytest.mark.parametrize("name", ["functions.parquet", "data/c/train-00000.parquet"])
def test_damaged_tables_are_named(tmp_path, name):
    place = _dataset(tmp_path)
    (place / name).write_bytes(b"no table")
    with pytest.raises(ArtifactError, match=r"table of (functions|modules)"):
        draw_plots(place, SUMMARY)


def test_a_directory_that_is_no_dataset_is_told(tmp_path):
    done = CliRunner().invoke(app, ["stats", str(tmp_path)])
    assert done.exit_code == 2 and "summary.json" in done.stderr
