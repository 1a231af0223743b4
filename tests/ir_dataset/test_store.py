import pytest

from ir_dataset.store import Store, TaskRow
from rewriter.errors import ArtifactError, ConfigError


def test_objects_come_back_by_the_hash_of_their_bytes(tmp_path):
    store = Store(tmp_path / "store")
    sha = store.put(b"bitcode")
    assert store.get(sha) == b"bitcode"
    assert store.put(b"bitcode") == sha
    assert not list(store.scratch.iterdir())


def test_a_damaged_object_is_told_and_not_returned(tmp_path):
    store = Store(tmp_path)
    sha = store.put(b"bitcode")
    store.path(sha).write_bytes(b"bitcodf")
    with pytest.raises(ArtifactError, match="damaged"):
        store.get(sha)


def test_a_missing_object_names_the_store(tmp_path):
    with pytest.raises(ArtifactError, match="is not in the store"):
        Store(tmp_path).get("0" * 64)


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="store="):
        Store(tmp_path / "file")


def test_a_task_whose_output_is_gone_counts_as_not_run(tmp_path):
    store = Store(tmp_path)
    sha = store.put(b"output")
    store.record(TaskRow("k", "verify", "a.c", "done", sha))
    assert Store(tmp_path).task("k") == TaskRow("k", "verify", "a.c", "done", sha)
    store.path(sha).unlink()
    assert store.task("k") is None


def test_failures_are_kept_until_they_are_forgotten(tmp_path):
    store = Store(tmp_path)
    store.record(TaskRow("k", "build", "zlib", "failed", "", "timeout", "took over 5 s"))
    assert [row.label for row in store.failures("build")] == ["zlib"]
    assert store.failures("fetch") == []
    assert store.counts() == {"build": {"failed": 1}}
    assert store.forget_failures() == 1
    assert store.task("k") is None


def test_a_workspace_is_at_the_same_place_and_empty_each_time(tmp_path):
    store = Store(tmp_path)
    with store.workspace("f" * 64) as first:
        (first / "left").write_text("x")
    with store.workspace("f" * 64) as second:
        assert second == first
        assert not list(second.iterdir())
    assert not first.exists()
