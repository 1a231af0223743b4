"""The .pt2 file: a zip as torch reads it, sealed, and checked before torch sees it.

All members lie under `model/`, uncompressed:

| member | what |
|---|---|
| `weights.bin` | every tensor once, each at a multiple of 64 bytes: mapped, never unpickled |
| `weights.txt` | where each constant lies, and the states; see `pt2_weights` |
| `data/aotinductor/<entry>/` | what AOTInductor made: shared object, source, metadata |
| `native/` | decode steps as C++: source, shared object and how it is called |
| `program.json` | the graph |
| `archive_format`, `archive_version`, `byteorder`, `.data/` | what torch wants of an archive |
| `rewriter.json` | metadata; the SHA-256 of every other member, and its own |
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from rewriter.errors import ArtifactError
from rewriter.export.directory import permissions, sync

__all__ = ["FORMAT", "METADATA", "ROOT", "WEIGHTS", "Pt2File", "Pt2Writer", "open_pt2", "writing"]

FORMAT = 1
ROOT = "model/"
METADATA, WEIGHTS = "rewriter.json", "weights.bin"
_NAMES = re.compile(
    r"weights\.(bin|txt)|program\.json|native/step\d+\.(json|cpp|so)|"
    r"data/aotinductor/(prefill|decode|forward)/\w+(\.\w+)?\.(cpp|so)|"
    r"data/aotinductor/(prefill|decode|forward)/\w+(\.\w+)?_metadata\.json|"
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|rewriter\.json"
)
"""Every member there may be. Nothing among them is ever unpickled."""
_UNSEALED = "0" * 64
_SEAL = re.compile(rb', "sha256": "([0-9a-f]{64})"}\Z')
_PAGE, _CHUNK = 4096, 2**22
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_MAX_METADATA = 2**28


class Pt2Writer:
    """Adds members to a new file. `weights.bin` comes first, so that it starts at a page of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        self.members: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._zip.fp = None  # nothing more is written to a file that failed

    def add(self, name: str, chunks: bytes | Iterable[bytes | memoryview]) -> None:
        """A member of these bytes."""
        info = zipfile.ZipInfo(ROOT + name)
        info.external_attr = 0o644 << 16
        if name == WEIGHTS:
            info.extra = _padding(info)
        digest = hashlib.sha256()
        with self._zip.open(info, "w", force_zip64=True) as member:
            for chunk in (chunks,) if isinstance(chunks, bytes) else chunks:
                digest.update(chunk)
                member.write(chunk)
        self.members[name] = digest.hexdigest()

    def seal(self, metadata: dict[str, Any]) -> None:
        """Add the metadata, with all hashes, and end the file."""
        stored = metadata | {"format": FORMAT, "members": self.members}
        text = json.dumps(stored, sort_keys=True, default=str).encode()[:-1]
        unsealed = text + f', "sha256": "{_UNSEALED}"}}'.encode()
        digest = hashlib.sha256(unsealed).hexdigest()
        self.add(METADATA, text + f', "sha256": "{digest}"}}'.encode())
        self._zip.close()


def _padding(info: zipfile.ZipInfo) -> bytes:
    """An extra field after which the first member's data start at a page."""
    zip64 = 20
    used = _LOCAL_HEADER.size + len(info.filename.encode()) + zip64 + 4
    return struct.pack("<2sH", b"FB", _PAGE - used) + b"\0" * (_PAGE - used)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, all or nothing, when the block ends well.

    Raises:
        ArtifactError: it cannot be written, e.g. because the disk is full.
    """
    if path.is_dir():
        raise ArtifactError(f"{path} is a directory; allowed: a file")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".pt2", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(permissions(0o666))
        for place in (temporary, path.parent):
            sync(place)
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Pt2File:
    """A file that was checked: its metadata, and where each member's bytes lie."""

    path: Path
    metadata: dict[str, Any]
    places: dict[str, tuple[int, int]]

    def read(self, name: str) -> bytes:
        """All bytes of a member. Raises ArtifactError where there is none."""
        if name not in self.places:
            raise ArtifactError(f"{self.path} has no member {name!r}")
        start, size = self.places[name]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size)


def open_pt2(path: str | Path, *, check_weights: bool = True) -> Pt2File:
    """Check a .pt2 file: nothing of it is loaded or run.

    Args:
        check_weights: False leaves out the hash of the weights alone, which takes as long as reading
            them.

    Raises:
        ArtifactError: it is missing, no file of ours, of another version, or damaged; or it has members
            that do not belong there. Says which.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist or is no file")
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            places = _places(path, archive, file)
            metadata = _metadata(path, file, places)
            _check_hashes(path, file, places, metadata, check_weights)
    except (zipfile.BadZipFile, struct.error, EOFError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    return Pt2File(path, metadata, places)


def _places(path: Path, archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Where the bytes of each member lie: apart from each other, and inside the file."""
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = _checked_name(path, info, places)
        start = _data_start(path, file, info)
        if info.header_offset < end or (not places and info.header_offset != 0):
            raise ArtifactError(f"{path} has the member {name!r} over or outside of others")
        end = start + info.file_size
        places[name] = (start, info.file_size)
    if archive.comment or end > archive.start_dir:
        raise ArtifactError(f"{path} has bytes that belong to no member")
    return places


def _checked_name(path: Path, info: zipfile.ZipInfo, seen: dict[str, tuple[int, int]]) -> str:
    """A member's name without the folder, if it may be there and is stored as it is."""
    name = info.filename.removeprefix(ROOT)
    if not info.filename.startswith(ROOT) or not _NAMES.fullmatch(name):
        raise ArtifactError(f"{path} has the member {info.filename!r}, which does not belong there")
    if name in seen:
        raise ArtifactError(f"{path} has the member {info.filename!r} twice")
    kind = stat.S_IFMT(info.external_attr >> 16)
    plain = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    if not plain or info.flag_bits & 0x1 or kind not in (0, stat.S_IFREG):
        raise ArtifactError(f"{path} has the member {info.filename!r}, which is no stored file")
    return name


def _data_start(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Behind the local header, which has to name the same member."""
    file.seek(info.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    name_size, extra_size = header[-2:]
    if header[0] != b"PK\3\4" or file.read(name_size) != info.filename.encode():
        raise ArtifactError(f"{path} is damaged: no {info.filename!r} at its place")
    return info.header_offset + _LOCAL_HEADER.size + name_size + extra_size


def _metadata(path: Path, file: BinaryIO, places: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Read, of our format, and unchanged since it was sealed."""
    if METADATA not in places:
        raise ArtifactError(f"{path} has no {ROOT}{METADATA}: it is no artifact of this package")
    start, size = places[METADATA]
    if size > _MAX_METADATA:
        raise ArtifactError(f"{path} has {size} bytes of {METADATA}; allowed: {_MAX_METADATA}")
    file.seek(start)
    text = file.read(size)
    stored = json.loads(text)
    version = stored.get("format") if isinstance(stored, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"{path} has format {version!r}; allowed: {FORMAT}")
    seal = _SEAL.search(text)
    unsealed = text[: seal.start(1)] + _UNSEALED.encode() + text[seal.end(1) :] if seal else b""
    if seal is None or hashlib.sha256(unsealed).hexdigest() != seal.group(1).decode():
        raise ArtifactError(f"{path} is damaged: {METADATA} is not as it was sealed")
    return stored


def _check_hashes(
    path: Path,
    file: BinaryIO,
    places: dict[str, tuple[int, int]],
    metadata: dict[str, Any],
    check_weights: bool,
) -> None:
    expected = metadata.get("members")
    if not isinstance(expected, dict) or expected.keys() != places.keys() - {METADATA}:
        raise ArtifactError(f"{path} has other members than {METADATA} lists")
    for name, digest in expected.items():
        if name == WEIGHTS and not check_weights:
            continue
        if _hash(file, *places[name]) != digest:
            raise ArtifactError(f"{path} is damaged: {name} is not as it was written")


def _hash(file: BinaryIO, start: int, size: int) -> str:
    file.seek(start)
    digest, left = hashlib.sha256(), size
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise EOFError("the file ends too early")
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()
