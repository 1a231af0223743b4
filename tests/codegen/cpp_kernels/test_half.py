"""Half-precision numbers in C++ are PyTorch's, each of them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from codegen.cpp_kernels.compiler import compile_library, inline_headers
from tests.codegen.cpp_kernels.running import needs_compiler

TEXT = """\
#include "vec.h"
extern "C" void widen(const rw::f16* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = rw::to_float(from[i]);
}
extern "C" void narrow(const float* from, rw::f16* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = rw::round_f16(from[i]);
}
"""


def call(name: str, source: Tensor, target: Tensor) -> Tensor:
    function = getattr(compile_library(inline_headers(TEXT)), name)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (source, target))
    function(*pointers, ctypes.c_int64(source.numel()))
    return target


@needs_compiler
def test_every_number_is_widened() -> None:
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.float16)
    wide = call("widen", every, torch.empty(2**16))
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(wide), torch.signbit(every))


@needs_compiler
def test_numbers_are_rounded_to_even() -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    edges = [65519.99, 65520.0, 2**-25, 2**-24, 1.5 * 2**-24, 2**-14, torch.inf, -0.0]
    small = torch.randn(100_000).exp2().mul(2.0**-20)
    x = torch.cat(
        (bits.view(torch.float32), torch.tensor(edges), torch.randn(100_000) * 100, small)
    )
    got = call("narrow", x, torch.empty(len(x), dtype=torch.float16))
    torch.testing.assert_close(got, x.half(), rtol=0, atol=0, equal_nan=True)
