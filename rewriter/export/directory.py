"""A directory that is written all or nothing and knows when it was damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rewriter.errors import ArtifactError

__all__ = [
    "MANIFEST",
    "check_files",
    "check_target",
    "is_artifact",
    "read_json",
    "replaced",
    "sync",
    "write_json",
    "write_manifest",
]

FORMAT = 1
MANIFEST = "manifest.json"


def is_artifact(directory: Path) -> bool:
    """Whether it holds a saved program."""
    return (directory / MANIFEST).is_file()


def check_target(directory: Path) -> None:
    """Whether a program could be saved there; before the long work starts.

    Raises:
        ArtifactError: it exists and is something else, or cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise ArtifactError(f"{directory} is a file; allowed: a new or empty directory")
    if directory.is_dir() and any(directory.iterdir()) and not is_artifact(directory):
        raise ArtifactError(
            f"{directory} holds other files; allowed: a new or empty directory, or a saved program"
        )
    if directory.is_dir() and directory.is_mount():
        raise ArtifactError(f"{directory} is a mount point; allowed: a directory inside of it")
    parent = _existing_parent(directory)
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            return
    except OSError as error:
        raise ArtifactError(
            f"{directory} cannot be written: {error.strerror} ({parent})"
        ) from error


def _existing_parent(directory: Path) -> Path:
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """A temporary directory beside the target that takes its place when the block ends well."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield temporary
        temporary.chmod(permissions(0o777))
        for path in temporary.rglob("*"):
            path.chmod(permissions(0o777 if path.is_dir() else 0o666))
            sync(path)
        sync(temporary)
        _put_in_place(temporary, directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, directory: Path) -> None:
    """Rename; what stood there before comes back if that fails."""
    if not directory.exists():
        os.replace(temporary, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    os.replace(directory, old)
    try:
        os.replace(temporary, directory)
    except OSError:
        os.replace(old, directory)
        raise
    shutil.rmtree(old)


def permissions(mode: int) -> int:
    """A mode as far as the user's mask allows it."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Values besides plain types, such as dtypes of a configuration, are written as text."""
    text = json.dumps(value, indent=1, default=lambda v: str(v).removeprefix("torch."))
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises ArtifactError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def write_manifest(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """The format and the SHA-256 of every file; `known` ones were hashed when they were written."""
    given = known or {}
    files = sorted(path.name for path in directory.iterdir())
    hashes = {name: given.get(name) or _sha256(directory / name) for name in files}
    write_json(directory / MANIFEST, {"format": FORMAT, "files": hashes})


def check_files(
    directory: Path, required: tuple[str, ...], *, known: frozenset[str] = frozenset()
) -> frozenset[str]:
    """The names of the manifest's files, each of them there, inside the directory, and unchanged.

    Args:
        known: files that were checked by other means and need not be read again.

    Raises:
        ArtifactError: one is not; names the file and what is wrong.
    """
    if not directory.is_dir():
        raise ArtifactError(f"{directory} does not exist or is no directory")
    if not is_artifact(directory):
        raise ArtifactError(f"{directory} is no saved program: {MANIFEST} is missing")
    manifest = read_json(directory / MANIFEST)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"{directory / MANIFEST} has format {version!r}; allowed: {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files.keys() >= set(required):
        raise ArtifactError(f"{directory / MANIFEST} does not list {', '.join(required)}")
    for name, expected in files.items():
        if name not in known:
            _check_file(directory, name, expected)
    return frozenset(files)


def _check_file(directory: Path, name: str, expected: str) -> None:
    path = directory / name
    if name in ("", ".", "..") or Path(name).name != name or path.is_symlink():
        raise ArtifactError(f"{directory / MANIFEST} names {name!r}, outside of the directory")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing")
    try:
        found = _sha256(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if found != expected:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one it was saved with")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
