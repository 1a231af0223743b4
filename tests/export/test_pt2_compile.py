"""One entry after another through AOTInductor, whose own cache must not mix them up."""

from __future__ import annotations

import pytest

from codegen.cpp_kernels.compiler import find_compiler
from rewriter import optimize
from rewriter.export.pt2_compile import compile_entry
from rewriter.export.pt2_entry import Limits, token_entries
from tests.tiny import tiny_llama


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_entries_for_two_lengths_keep_their_states_apart():
    program = optimize(tiny_llama(num_hidden_layers=1), backend="eager", verify=False).program
    for max_length in (32, 48):
        _, decode = token_entries(program, Limits(batch=1, max_length=max_length))
        text = compile_entry(decode).files["decode.wrapper.cpp"].decode()
        assert f"shape = {{1, 2, {max_length}, 8}}" in text
