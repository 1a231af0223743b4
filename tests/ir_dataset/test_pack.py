"""Parquet as ComPile's readers expect it, and the same bytes each time."""

import hashlib

import msgspec
import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pip install 'rewriter[ir]'")

import pyarrow.parquet as pq

from ir_dataset import pack
from ir_dataset.store import Store

COMPILE = (
    "content",
    "license_expression",
    "license_source",
    "license_files",
    "package_source",
    "language",
)
BLANK = {
    name: {"str": "", "int": 0, "int | None": None, "bool": False}.get(str(kind), ())
    for name, kind in pack.ModuleRow.__annotations__.items()
}


def _row(store, content, **fields):
    values = {**BLANK, "language": "c", "split": "train", "module_id": store.put(content), **fields}
    return msgspec.convert(values, pack.ModuleRow)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def _hashes(directory):
    return {
        path.relative_to(directory): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*.parquet")
    }


def test_columns_begin_with_those_of_compile(store, tmp_path):
    (name,) = pack.write_modules(tmp_path, store, [_row(store, b"BC")])
    assert tuple(pq.read_schema(tmp_path / name).names[:6]) == COMPILE


def test_rows_in_any_order_give_the_same_bytes(store, tmp_path):
    rows = [
        _row(store, bytes([i]) * 50, package=f"p{i % 3}", source_path=f"{i}.c", arguments=("-O2",))
        for i in range(40)
    ]
    rows.append(_row(store, b"rust", language="rust", split="test"))
    written = pack.write_modules(tmp_path / "a", store, rows)
    pack.write_modules(tmp_path / "b", store, rows[::-1])
    assert written == ["data/c/train-00000.parquet", "data/rust/test-00000.parquet"]
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")


def test_files_are_cut_at_the_shard_size(store, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_BYTES", 100)
    rows = [_row(store, bytes([i]) * 60) for i in range(3)]
    assert len(pack.write_modules(tmp_path, store, rows)) == 3


def test_datasets_loads_the_files_without_a_network(store, tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    rows = [_row(store, bytes([i]), source_path=f"{i}.c") for i in range(3)]
    names = pack.write_modules(tmp_path, store, rows)
    files = [str(tmp_path / name) for name in names]
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(loaded["content"]) == [b"\x00", b"\x01", b"\x02"]


def test_functions_carry_numbers_and_embeddings(tmp_path):
    row = pack.FunctionRow(
        module_id="m",
        name="f",
        language="c",
        project="p",
        fn_hash="1",
        norm_hash="2",
        cluster_id=0,
        n_instructions=3,
        n_blocks=1,
        split="train",
        duplicate=False,
    )
    embeddings = np.arange(4, dtype=np.float32).reshape(2, 2)
    path = tmp_path / "functions.parquet"
    pack.write_functions(path, [row, row], {"size_oz": np.array([1.0, np.nan])}, embeddings)
    table = pq.read_table(path)
    assert table["size_oz"].to_pylist() == [1.0, None]
    assert table["ir2vec"].to_pylist() == [[0, 1], [2, 3]]


def test_licence_texts_are_stored_once(store, tmp_path):
    sha = store.put(b"Permission is hereby granted")
    pack.write_licenses(tmp_path / "licenses.parquet", store, {sha: "MIT"})
    (found,) = pq.read_table(tmp_path / "licenses.parquet").to_pylist()
    assert found == {"sha256": sha, "spdx": "MIT", "text": "Permission is hereby granted"}
