"""Changed copies of a .pt2, made as somebody with intent would make them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from rewriter.export.pt2_archive import METADATA, Pt2Writer, open_pt2

__all__ = ["members", "rewritten", "zipped"]


def members(path: Path) -> list[tuple[str, bytes]]:
    """Names without the folder, and bytes, in the order of the file."""
    with zipfile.ZipFile(path) as archive:
        return [(i.filename.removeprefix("model/"), archive.read(i)) for i in archive.infolist()]


def rewritten(path: Path, target: Path, *, metadata: dict[str, Any]) -> Path:
    """The same members under other metadata, sealed."""
    stored = open_pt2(path).metadata
    stored = {key: value for key, value in stored.items() if key not in ("sha256", "members")}
    with target.open("wb") as file:
        writer = Pt2Writer(file)
        for name, data in members(path):
            if name != METADATA:
                writer.add(name, data)
        writer.seal(stored | metadata)
    return target


def zipped(
    target: Path, stored: list[tuple[str, bytes]], *, compression: int = zipfile.ZIP_STORED
) -> Path:
    """A plain zip of these members, by full name."""
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, data in stored:
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=compression)
    return target
