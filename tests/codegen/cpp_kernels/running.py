"""What tests of C++ kernels share: instruction sets that run here, poisoned memory, seeded mutations."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from codegen.cpp_kernels import compiler
from codegen.cpp_kernels.compiler import ISAS, compile_library, find_compiler
from rewriter import processor

__all__ = ["ISA_CASES", "RUNNABLE", "mutate", "needs_compiler", "poisoned"]

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler is installed")


def _runnable() -> list[str]:
    flags = set(" ".join(processor.values("flags")["flags"]).split())
    needs = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, "avx2": {"avx2", "fma"}}
    x86 = [name for name, wanted in needs.items() if wanted <= flags]
    arm = ["neon"] if platform.machine() in ("aarch64", "arm64") else []
    return ["native", *x86, *arm, "scalar"]


RUNNABLE = [isa for isa in _runnable() if isa in ISAS]
"""Keys of `ISAS` that this processor can run."""

ISA_CASES = [
    ("native", torch.float32),
    *((isa, torch.bfloat16) for isa in RUNNABLE),
]
"""Both dtypes where most runs; elsewhere the one that is loaded in a way of its own. A compilation each."""


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors hold NaN until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def mutate(monkeypatch: pytest.MonkeyPatch, module: ModuleType, old: str, new: str) -> None:
    """From now on what `module` compiles has `new` in the place of `old`, which has to be there.

    Compiled in half the time, as speed does not matter. Entry points kept by the module's `_entry` are
    forgotten; the test has to call `_entry.cache_clear()` once more when it is done.
    """
    module._entry.cache_clear()

    def compile_mutated(text: str, *, isa: str = "native") -> Any:
        assert old in text, f"nothing to mutate: {old!r}"
        return compile_library(text.replace(old, new), isa=isa)

    flags = ["-O1" if flag == "-O3" else flag for flag in compiler._FLAGS]
    monkeypatch.setattr(compiler, "_FLAGS", flags)
    monkeypatch.setattr(module, "compile_library", compile_mutated)
