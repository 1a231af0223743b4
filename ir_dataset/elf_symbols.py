"""Sizes of functions in an ELF object, from its symbol table.

Source: https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.symtab.html
"""

from __future__ import annotations

import struct

from rewriter.errors import ArtifactError

__all__ = ["function_sizes"]

_SYMTAB = 2
_FUNCTION, _IFUNC = 2, 10
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")


def function_sizes(data: bytes) -> dict[str, int]:
    """Bytes of machine code of each function that the object defines, by name.

    Raises:
        ArtifactError: the bytes are no 64-bit little-endian ELF object, or its tables are cut off.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        raise ArtifactError("the object is no 64-bit little-endian ELF file")
    try:
        header = _HEADER.unpack_from(data)
        start, width, count = header[5], header[10], header[11]
        sections = [_SECTION.unpack_from(data, start + at * width) for at in range(count)]
        if count == 0 and start:  # more than 65,279 sections: the first one says how many
            count = _SECTION.unpack_from(data, start)[5]
            sections = [_SECTION.unpack_from(data, start + at * width) for at in range(count)]
        found: dict[str, int] = {}
        for section in sections:
            if section[1] == _SYMTAB:
                found.update(_symbols(data, section, sections[section[6]]))
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise ArtifactError(f"the object's tables are damaged: {error}") from error
    return found


def _symbols(data: bytes, table: tuple[int, ...], strings: tuple[int, ...]) -> dict[str, int]:
    found = {}
    names = data[strings[4] : strings[4] + strings[5]]
    for name, info, _, section, _, size in _SYMBOL.iter_unpack(
        data[table[4] : table[4] + table[5]]
    ):
        if section and info & 15 in (_FUNCTION, _IFUNC):
            found[names[name : names.index(b"\0", name)].decode("utf-8", "surrogateescape")] = size
    return found
