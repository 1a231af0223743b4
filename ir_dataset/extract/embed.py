"""Bitcode out of objects that carry it: ComPile's way, where clang does the build itself.

`-fembed-bitcode=all` puts the unoptimised bitcode into section `.llvmbc` of each object and the front
end's command line into `.llvmcmd`. Compile-and-link lines leave no object, -O0 leaves `optnone`, and
tools that take `.llvmbc` for link-time optimisation break some builds; so the shim's way is the default.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

__all__ = ["read_sections", "unpack_embedded"]

_ELF = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_RELOCATABLE = 1
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_WANTED = (".llvmbc", ".llvmcmd", "__LLVM,__bitcode", "__LLVM,__swift_cmdline")
"""clang's, and swiftc's, which keeps Darwin's names."""


def read_sections(data: bytes) -> dict[str, bytes]:
    """Those sections of a relocatable 64-bit ELF object; empty where it is none, or lacks them."""
    if not data.startswith(_ELF) or len(data) < _HEADER.size:
        return {}
    header = _HEADER.unpack_from(data)
    kind, table, entry_size, count, names_index = (header[index] for index in (1, 6, 11, 12, 13))
    end = table + entry_size * count
    if kind != _RELOCATABLE or entry_size != _SECTION.size or end > len(data):
        return {}
    sections = [_SECTION.unpack_from(data, table + index * entry_size) for index in range(count)]
    if names_index >= count:
        return {}
    names = _content(data, sections[names_index])
    found = {}
    for section in sections:
        name = names[section[0] :].partition(b"\0")[0].decode("ascii", "replace")
        if name in _WANTED:
            found[name] = _content(data, section)
    return found


def unpack_embedded(drop: Path) -> None:
    """Put the bitcode of the objects that the shim kept beside them, or say that there is none."""
    for path in sorted(drop.glob("*.o")):
        if path.is_symlink() or not path.is_file():
            continue
        found = read_sections(path.read_bytes())
        description = path.with_suffix(".json")
        if found.get(".llvmbc"):
            path.with_suffix(".bc").write_bytes(found[".llvmbc"])
        elif description.is_file() and not description.is_symlink():
            source = json.loads(description.read_bytes())["source_path"]
            failure = {
                "kind": "compile",
                "reason": "no .llvmbc in the object",
                "source_path": source,
            }
            path.with_suffix(".failed.json").write_text(json.dumps(failure, sort_keys=True))
            description.unlink()
        path.unlink()


def _content(data: bytes, section: tuple[int, ...]) -> bytes:
    offset, size = section[4], section[5]
    return data[offset : offset + size]
