"""Functions of a dataset as rows to learn from: which are taken, and what is not a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("lightgbm")
pytest.importorskip("scipy")

from ir_dataset.cost_models.fit_dataset import fit_dataset
from ir_dataset.cost_models.size import SizeModel
from ir_dataset.cost_models.size_data import read
from ir_dataset.features import FEATURES
from rewriter.errors import ArtifactError

NAN = float("nan")


def write(directory: Path, **columns: object) -> Path:
    """A table of functions with these columns, and features 0, 1, 2, … in each row."""
    import pyarrow as pa
    from pyarrow import parquet

    count = len(columns["split"])  # pyright: ignore[reportArgumentType]
    numbers = {f"feature_{n}": np.arange(count, dtype=np.float32) for n in FEATURES}
    parquet.write_table(pa.table({**columns, **numbers}), directory / "functions.parquet")
    return directory


def test_takes_the_first_of_each_that_has_a_size(tmp_path: Path) -> None:
    data = read(
        write(
            tmp_path,
            project=["a", "a", "b", "b", "c"],
            split=["train", "train", "test", "", "test"],
            duplicate=[False, True, False, False, False],
            size_oz=[10.0, 11.0, NAN, 13.0, 14.0],
            size_o2=[20.0, 21.0, 22.0, NAN, NAN],
        )
    )
    assert data.features[:, 0].tolist() == [0.0, 2.0, 3.0, 4.0]
    assert data.rows("Oz").sizes.tolist() == [10.0, 13.0, 14.0]
    assert data.rows("Oz", "test").projects.tolist() == ["c"]
    assert data.rows("O2").sizes.tolist() == [20.0, 22.0]


def test_learns_and_judges_each_level_that_is_there(tmp_path: Path) -> None:
    count = 200
    found = fit_dataset(
        write(
            tmp_path,
            project=[f"p{i % 7}" for i in range(count)],
            split=["test" if i % 5 == 0 else "train" for i in range(count)],
            duplicate=[False] * count,
            size_oz=[8.0 + 2 * i for i in range(count)],
        )
    )
    assert found["O2"] == {"reason": "the toolchain that made the labels has no such level"}
    assert found["Oz"]["train_rows"] == 160 and found["Oz"]["test"]["rows"] == 40
    assert found["Oz"]["test"]["tau"] > 0.9
    kept = SizeModel.load(tmp_path / "models" / "size_oz.json.gz")
    assert kept.training_data == found["training_data"] and kept.metrics["test"]["rows"] == 40


def test_says_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"functions\.parquet"):
        read(tmp_path)
    (tmp_path / "functions.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ArtifactError, match="not a table of functions"):
        read(tmp_path)
