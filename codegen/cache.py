"""Generated text and what was compiled from it, by content: damaged or missing entries are made anew.

Nothing is locked. An entry is written beside its place and moved there whole, so that processes that
make the same entry at once do the work twice and harm nothing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from rewriter.errors import ConfigError

__all__ = ["cache_directory", "cached_build", "cached_text", "content_hash"]


def cache_directory() -> Path:
    """`$REWRITER_CACHE` or `~/.cache/rewriter`, made for this user alone.

    Raises:
        ConfigError: it belongs to somebody else, whose code would run here.
    """
    directory = Path(os.environ.get("REWRITER_CACHE") or Path.home() / ".cache" / "rewriter")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and directory.stat().st_uid != os.getuid():
        raise ConfigError("REWRITER_CACHE", str(directory), "a directory of your own")
    return directory


def content_hash(*parts: str | bytes) -> str:
    """24 hexadecimal digits that stand for these parts and their boundaries."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:24]


def cached_text(text: str, suffix: str) -> Path:
    """A file with this text, named by its hash; written again where the file differs.

    Args:
        suffix: of the file's name, e.g. `".py"`.
    """
    path = cache_directory() / f"k{content_hash(text)}{suffix}"
    if not path.exists() or path.read_text() != text:
        _place(path, lambda place: place.write_text(text))
    return path


def cached_build(key: str, suffix: str, build: Callable[[Path], object]) -> Path:
    """A binary made by `build(path)`, which is called only where a whole one is not there yet.

    Args:
        key: everything the binary depends on.
        suffix: of the file's name, e.g. `".so"`.
        build: writes the file it is given; what it raises is passed on and leaves nothing behind.
    """
    path = cache_directory() / f"k{key}{suffix}"
    digest = path.with_name(path.name + ".sha256")
    if not (path.exists() and digest.exists() and digest.read_text() == _file_hash(path)):
        _place(path, build)
        _place(digest, lambda place: place.write_text(_file_hash(path)))
    return path


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _place(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
