from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from codegen.cache import cache_directory, cached_build, cached_text, content_hash
from rewriter.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own for each test."""
    place = tmp_path / "cache"
    monkeypatch.setenv("REWRITER_CACHE", str(place))
    return place


def damage(path: Path, content: bytes) -> None:
    """In a new file: the old one may be loaded."""
    replacement = path.with_name("replacement")
    replacement.write_bytes(content)
    replacement.replace(path)


def test_directory_is_made_for_this_user_alone(directory: Path) -> None:
    assert cache_directory() == directory
    assert directory.stat().st_mode & 0o777 == 0o700


def test_directory_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWRITER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "rewriter"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_directory_of_somebody_else(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        directory.mkdir()
        os.chown(directory, 12345, -1)
    else:
        monkeypatch.setenv("REWRITER_CACHE", "/")
    with pytest.raises(ConfigError, match="a directory of your own"):
        cached_text("int x;", ".cpp")


def test_hash_knows_where_parts_end() -> None:
    assert content_hash("ab", "c") != content_hash("a", "bc") != content_hash("abc")
    assert content_hash("ä") == content_hash("ä".encode()) and len(content_hash()) == 24


def test_text_is_found_again_and_repaired(directory: Path) -> None:
    path = cached_text("int x;", ".cpp")
    written = path.stat().st_mtime_ns
    assert cached_text("int x;", ".cpp") == path and path.stat().st_mtime_ns == written
    assert cached_text("int x;", ".py") != path != cached_text("int y;", ".cpp")
    damage(path, b"int")
    assert cached_text("int x;", ".cpp").read_text() == "int x;"
    path.unlink()
    assert cached_text("int x;", ".cpp").read_text() == "int x;"
    assert not [name for name in os.listdir(directory) if name.startswith(".")]


def test_build_once_and_again_when_damaged(directory: Path) -> None:
    built: list[Path] = []

    def build(place: Path) -> None:
        built.append(place)
        place.write_bytes(b"binary")

    path = cached_build("key", ".so", build)
    assert cached_build("key", ".so", build) == path and len(built) == 1
    assert cached_build("other", ".so", build) != path and len(built) == 2
    digest = path.with_name(path.name + ".sha256")
    for spoil in (
        lambda: damage(path, b"bin"),
        lambda: damage(path, b""),
        path.unlink,
        lambda: damage(digest, b"0123"),
        digest.unlink,
    ):
        before = len(built)
        spoil()
        assert cached_build("key", ".so", build).read_bytes() == b"binary"
        assert len(built) == before + 1
        assert cached_build("key", ".so", build) == path and len(built) == before + 1


def test_failed_build_leaves_nothing(directory: Path) -> None:
    def fail(place: Path) -> None:
        place.write_bytes(b"half")
        raise ValueError("compiler stopped")

    with pytest.raises(ValueError, match="compiler stopped"):
        cached_build("key", ".so", fail)
    assert not list(directory.iterdir())
    whole = cached_build("key", ".so", lambda place: place.write_bytes(b"whole"))
    assert whole.read_bytes() == b"whole"


WORKER = """
import sys, time, types
from pathlib import Path

package = types.ModuleType("rewriter")  # its errors alone: all of it takes seconds to import
package.__path__ = [str(Path("rewriter").resolve())]
sys.modules["rewriter"] = package
from codegen.cache import cached_build, cached_text

def build(place):
    place.write_bytes(b"x" * 100_000)
    time.sleep(0.001)

ready, go = Path(sys.argv[1]), Path(sys.argv[2])
ready.touch()
while not go.exists():
    time.sleep(0.001)
for i in range(60):
    assert cached_text("text %d" % i, ".cpp").read_text() == "text %d" % i
    data = cached_build("key%d" % i, ".so", build).read_bytes()
    assert data == b"x" * 100_000, len(data)
"""


def test_processes_at_once(directory: Path, tmp_path: Path) -> None:
    """All see whole entries, whoever wrote them, and leave nothing unfinished behind."""
    go, waiting = tmp_path / "go", [tmp_path / f"ready{i}" for i in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(ready), str(go)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
        )
        for ready in waiting
    ]
    while any(p.poll() is None for p in processes) and not all(r.exists() for r in waiting):
        pass
    go.touch()
    told = [p.communicate(timeout=120)[1].decode() for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(told)
    assert not [name for name in os.listdir(directory) if name.startswith(".")]
    again = [
        cached_build(f"key{i}", ".so", lambda place: place.write_bytes(b"")) for i in range(60)
    ]
    assert {path.stat().st_size for path in again} == {100_000}
