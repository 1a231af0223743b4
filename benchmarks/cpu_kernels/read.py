"""How fast a buffer can be read at all: the best of several plain loops that only add it up.

The ceiling that kernels are held against. One stream a thread is not the fastest way to read, so loops
with more, side by side and with the lines ahead asked for, are tried too.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from torch import Tensor

from codegen.cpp_kernels.compiler import compile_library, inline_headers

__all__ = ["read_candidates"]

_TEXT = """\
#include "parallel.h"
#include "vec.h"

// The sum of `bytes`, as floats, by STREAMS pieces of 8 KiB side by side.
template <int STREAMS, bool AHEAD>
float add_up(const char* data, int64_t bytes, int thread, int num_threads) {
    constexpr int64_t PIECE = 8192, LINE = 64;
    rw::Range mine = rw::share(bytes / (STREAMS * PIECE), thread, num_threads);
    rw::Vec totals[8] = {};
    for (int64_t block = mine.begin; block < mine.end; ++block)
        for (int64_t c = 0; c < PIECE; c += LINE) {
#pragma GCC unroll 16
            for (int s = 0; s < STREAMS; ++s) {
                const char* line = data + (block * STREAMS + s) * PIECE + c;
                if (AHEAD) __builtin_prefetch(line + 512);
                for (int64_t at = 0; at < LINE; at += sizeof(rw::Vec))
                    totals[s % 8] += rw::load((const float*)(line + at));
            }
        }
    float total = 0;
    for (rw::Vec part : totals) total += rw::sum(part);
    return total;
}

extern "C" void read_all(const char* data, int64_t bytes, int way, float* totals, int threads) {
    rw::parallel(threads, [&](int thread, int num_threads) {
        totals[16 * thread] = way == 0   ? add_up<1, false>(data, bytes, thread, num_threads)
                              : way == 1 ? add_up<8, false>(data, bytes, thread, num_threads)
                              : way == 2 ? add_up<8, true>(data, bytes, thread, num_threads)
                                         : add_up<16, true>(data, bytes, thread, num_threads);
    });
}
"""
_WAYS = ("1 stream", "8 streams", "8 streams, ahead", "16 streams, ahead")


def read_candidates(buffer: Tensor, threads: int) -> dict[str, Callable[[], object]]:
    """Calls that read all of a contiguous buffer, by name."""
    totals = (ctypes.c_float * (16 * threads))()
    arguments = buffer.data_ptr(), buffer.nbytes
    return {
        name: functools.partial(_reader(), *arguments, way, totals, threads)
        for way, name in enumerate(_WAYS)
    }


@functools.cache
def _reader() -> ctypes._NamedFuncPointer:
    function = compile_library(inline_headers(_TEXT)).read_all
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, ctypes.c_int64, ctypes.c_int, pointer, ctypes.c_int]
    function.restype = None
    return function
