"""Small modules as clang, rustc, flang and zig print them, and one with what those seldom write."""

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("c", "cpp", "fortran", "odd", "rust", "zig")


def text_of(name: str) -> str:
    return (FIXTURES / f"{name}.ll").read_text()


def bitcode_of(name: str) -> bytes:
    return bitcode_of_text(text_of(name))


def bitcode_of_text(text: str) -> bytes:
    llvm = pytest.importorskip("llvmlite.binding", reason="pip install 'rewriter[ir]'")
    context = llvm.create_context()
    return llvm.parse_assembly(text, context=context).as_bitcode()
