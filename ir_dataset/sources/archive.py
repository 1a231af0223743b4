"""Archives: fetched and checked, unpacked where a build is to run, and made of what fetching left."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

from rewriter.errors import SourceError

__all__ = ["download", "pack", "unpack_into", "unpack_source"]

_SECONDS = 120.0


def download(url: str, sha256: str, into: Path) -> Path:
    """Fetch a file into a directory; its name is the last part of the address.

    Raises:
        SourceError: it is not to be had, or its bytes have another hash.
    """
    place = into / (url.rstrip("/").rpartition("/")[2] or "archive")
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer, place.open("wb") as stream:
            shutil.copyfileobj(answer, stream)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise SourceError(f"{url} cannot be had: {error}") from error
    with place.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise SourceError(f"{url} has sha256 {found}, wanted is {sha256}")
    return place


def unpack_source(archive: Path, workspace: Path) -> None:
    """The archive's one directory becomes `src`; entries that point out of it are refused."""
    into = workspace / "unpacked"
    unpack_into(archive, into)
    folders = [path for path in into.iterdir() if path.is_dir()]
    if len(folders) != 1:
        raise SourceError(f"{archive.name} has {len(folders)} directories at its top, not one")
    folders[0].rename(workspace / "src")


def unpack_into(archive: Path, into: Path) -> None:
    """Unpack a tar or zip archive; entries that point out of the directory are refused."""
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(into)
        else:
            with tarfile.open(archive) as packed:
                packed.extractall(into, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise SourceError(f"{archive.name} cannot be unpacked: {error}") from error


def pack(root: Path, names: Iterable[str], archive: Path) -> Path:
    """A tar of files and directories below `root`, sorted, without owners and times."""
    paths = sorted(
        path
        for name in names
        for path in (root / name, *(root / name).rglob("*"))
        if path.is_symlink() or path.exists()
    )
    with tarfile.open(archive, "w") as packed:
        for path in paths:
            packed.add(path, path.relative_to(root).as_posix(), recursive=False, filter=_plain)
    return archive


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """None for sockets and pipes."""
    if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member
