"""Verify: is this module IR that LLVM reads, and who is it."""

from __future__ import annotations

from ir_dataset.identity import (
    function_hash,
    minhashes,
    module_hash,
    normal_hash,
    structural_hash,
)
from ir_dataset.ir_text import parse_module
from ir_dataset.reader import read_module
from ir_dataset.records import Record
from ir_dataset.store import Store

__all__ = ["FunctionSummary", "ModuleSummary", "verify_module"]


class FunctionSummary(Record, frozen=True):
    """A defined function, by what it does."""

    name: str
    n_instructions: int
    n_blocks: int
    fn_hash: str
    norm_hash: str
    minhash: str = ""
    """Empty for short functions; see `identity.minhashes`."""


class ModuleSummary(Record, frozen=True):
    """What reading a module told. Where it could not be read, only `module` and `reason` are set."""

    module: str
    """sha256 of its bytes."""
    reader_ok: bool
    reader: str = ""
    reason: str = ""
    target_triple: str = ""
    n_functions: int = 0
    """Defined ones."""
    n_instructions: int = 0
    text_chars: int = 0
    norm_hash: str = ""
    struct_hash: str = ""
    """LLVM's, in hexadecimal; empty where it was not asked for."""
    empty: bool = False
    """True where it defines no function: it is read, but never kept."""
    functions: tuple[FunctionSummary, ...] = ()


def verify_module(
    store: Store,
    sha: str,
    *,
    writer_llvm: str = "",
    allow_newer: bool = False,
    opt: str | None = None,
) -> ModuleSummary:
    """Read, verify and identify a stored module.

    Args:
        sha: of bitcode or assembly in the store.
        writer_llvm: version of the LLVM that wrote it.
        allow_newer: accept a writer newer than the reader where its module can be read.
        opt: path of LLVM's `opt`, for the structural hash as well.

    Raises:
        ArtifactError: the store does not have the module.
    """
    data = store.get(sha)
    reading = read_module(data, writer_llvm=writer_llvm, allow_newer=allow_newer)
    if reading.reason:
        return ModuleSummary(
            module=sha, reader_ok=False, reader=reading.reader, reason=reading.reason
        )
    module = parse_module(reading.text)
    functions = module.functions
    hashes = [normal_hash(function) for function in functions]
    signatures = minhashes(functions)
    return ModuleSummary(
        module=sha,
        reader_ok=True,
        reader=reading.reader,
        target_triple=module.triple,
        n_functions=len(functions),
        n_instructions=module.n_instructions,
        text_chars=len(reading.text),
        norm_hash=module_hash(module, hashes),
        struct_hash=structural_hash(data, opt) if opt else "",
        empty=not functions,
        functions=tuple(
            FunctionSummary(
                name=function.name,
                n_instructions=len(function.shapes),
                n_blocks=len(function.blocks),
                fn_hash=function_hash(function),
                norm_hash=normal,
                minhash=signature,
            )
            for function, normal, signature in zip(functions, hashes, signatures, strict=True)
        ),
    )
