from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from codegen.cpp_kernels import compiler
from codegen.cpp_kernels.compiler import (
    CompileError,
    compile_library,
    find_compiler,
    inline_headers,
    why_no_compiler,
)
from codegen.cpp_kernels.provenance import provenance
from codegen.kernel import safe_name
from rewriter.errors import ConfigError
from tests.codegen.cpp_kernels.running import RUNNABLE, needs_compiler

ANSWER = 'extern "C" int answer() { return 42; }\n'
HOSTILE = (
    'x"; system("touch owned"); //',
    "a\nb */ #include </etc/passwd>",
    "модель.слой-1",
    "%s{0}$(id)`id`",
    "9 lives\\",
    "",
    "__reserved__",
)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    find_compiler.cache_clear()
    yield
    find_compiler.cache_clear()


def test_no_compiler_is_told(no_compiler: None) -> None:
    assert find_compiler() is None
    with pytest.raises(ConfigError, match=r"CXX.*install g\+\+"):
        compile_library(ANSWER)


def test_compiler_that_does_not_answer(no_compiler: None, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/false\n")
    broken.chmod(0o755)
    assert find_compiler() is None


def test_a_wrong_cxx_is_told_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    find_compiler.cache_clear()
    try:
        assert find_compiler() is None
        with pytest.raises(ConfigError, match=r"nowhere' does not answer to --version"):
            compile_library(ANSWER)
        assert "nowhere" in (why_no_compiler() or "")
    finally:
        find_compiler.cache_clear()


def test_unknown_instruction_set() -> None:
    with pytest.raises(ConfigError, match="isa='sse9' is not allowed: one of native"):
        compile_library(ANSWER, isa="sse9")


@needs_compiler
@pytest.mark.parametrize("isa", RUNNABLE)
def test_instruction_sets_run(isa: str) -> None:
    text = '#include "vec.h"\nextern "C" int lanes() { return rw::LANES; }\n'
    lanes = compile_library(inline_headers(text), isa=isa).lanes()
    assert lanes in {"avx512": (16,), "avx2": (8,), "neon": (4,)}.get(isa, (1, 4, 8, 16))


@needs_compiler
def test_refused_text_is_a_defect_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    with pytest.raises(CompileError, match="undeclared_name") as error:
        compile_library('extern "C" int f() { return undeclared_name; }')
    assert ".cpp" in str(error.value)
    assert not list(tmp_path.glob("*.so")) and not list(tmp_path.glob(".*"))


@needs_compiler
def test_damaged_library_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    assert compile_library(ANSWER).answer() == 42
    (library,) = tmp_path.glob("*.so")
    whole = library.read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "half").replace(library)
    assert compile_library(ANSWER).answer() == 42
    assert library.read_bytes() == whole
    assert compile_library(ANSWER.replace("42", "43")).answer() == 43
    assert len(list(tmp_path.glob("*.so"))) == 2


@needs_compiler
def test_key_depends_on_flags_and_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    compile_library(ANSWER)
    monkeypatch.setattr(compiler, "machine", lambda: "another processor")
    compile_library(ANSWER)
    monkeypatch.setattr(compiler, "_FLAGS", [f for f in compiler._FLAGS if f != "-O3"])
    compile_library(ANSWER)
    assert len(list(tmp_path.glob("*.so"))) == 3


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="no list of loaded libraries")
def test_one_openmp_runtime() -> None:
    """PyTorch's: a second one would fight with it for the cores."""
    text = (
        '#include "parallel.h"\n#include <atomic>\nextern "C" int sum(int n) { std::atomic<int> s{0};'
        " rw::parallel(n, [&](int t, int) { s += t + 1; rw::barrier(); }); return s; }\n"
    )
    library = compile_library(inline_headers(text))
    assert [library.sum(n) for n in (0, 1, 2, 3)] == [1, 1, 3, 6]
    loaded = set(
        re.findall(r"/\S*/lib(?:gomp|omp|iomp5)\b\S*", Path("/proc/self/maps").read_text())
    )
    assert len(loaded) == 1, loaded


def test_headers_come_once_and_whole() -> None:
    text = inline_headers('#include "gemv.h"\n#include "vec.h"\n#include <cmath>\nint x;\n')
    assert text.count("// ---- vec.h") == text.count("// ---- gemv.h") == 1
    assert text.index("// ---- vec.h") < text.index("inline void gemv(")
    assert '#include "' not in text and "#pragma once" not in text
    assert text.endswith("#include <cmath>\nint x;\n")


@settings(max_examples=50, deadline=None)
@given(st.text())
@example("a__b").via("double underscores are the compiler's")
def test_safe_name(text: str) -> None:
    name = safe_name(text)
    assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and len(name) <= 62
    assert "__" not in name and name.isidentifier()


@needs_compiler
def test_hostile_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's names in a function's name and in the comment at its head change nothing else."""
    monkeypatch.chdir(tmp_path)
    names = [safe_name(text) for text in HOSTILE]
    functions = "".join(
        f'extern "C" int f{i}_{name}() {{ return {i}; }}\n' for i, name in enumerate(names)
    )
    text = provenance(" ".join(HOSTILE), "a\nint injected;", "https://x/\r\nint too;", functions)
    text = provenance("ends with a backslash \\", "a??/", "u\u2028int again;\\", text)
    head = text.removesuffix(functions).splitlines()
    assert len(head) == 8 and all(line.startswith("// ") for line in head)
    assert not any(line.endswith(("\\", "??/")) for line in head)
    library = compile_library(text)
    assert [getattr(library, f"f{i}_{n}")() for i, n in enumerate(names)] == list(range(len(names)))
    for injected in ("injected", "too", "again"):
        with pytest.raises(ValueError, match=injected):
            ctypes.c_int.in_dll(library, injected)
    assert not os.listdir(tmp_path)


def test_provenance_tells_edits() -> None:
    first, second = (
        provenance("gemv{}", "generator", "", text) for text in ("int x;\n", "int y;\n")
    )
    assert first.splitlines()[:2] == second.splitlines()[:2]
    assert first.splitlines()[2] != second.splitlines()[2]
    assert "Source" not in first and first.endswith("int x;\n")
