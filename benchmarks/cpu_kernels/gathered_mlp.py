"""A gated feed-forward block over a part of its neurons, against all of it by dense kernels."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from codegen.cpp_kernels.compiler import compile_library, inline_headers
from codegen.cpp_kernels.gathered_mlp import (
    cost,
    gathered_mlp,
    kept_largest,
    reference,
    threshold_mlp,
    top_k_mlp,
)
from codegen.cpp_kernels.gemv import CPP_TYPES
from cpu_kernels.case import Candidate, Case

__all__ = ["cases"]

INTERMEDIATE_SIZE, HIDDEN_SIZE = 8192, 2048
DENSITIES = (0.1, 0.25, 0.5, 0.75, 0.9)
BLOCKS_BYTES = 600_000_000
"""Calls go around among copies of the weights, as among a model's layers: none is in a cache."""
_DENSE = """\
#include "functions.h"
#include "gemv.h"
#include "parallel.h"

typedef {type} Element;

// x, gate, up as in the gathered block; down [out_size, intermediate_size].
extern "C" void dense(const Element* x, const Element* gate, const Element* up, const Element* down,
                      Element* out, float* wide, float* active, int64_t intermediate_size,
                      int64_t hidden_size, int threads) {{
    rw::parallel(threads, [&](int thread, int num_threads) {{
        rw::widen(x, 0, wide, 1, hidden_size, thread, num_threads);
        rw::barrier();
        rw::gemv_pair(gate, up, hidden_size, wide, intermediate_size, hidden_size,
                      [&](int64_t i, float g, float u) {{ active[i] = rw::silu(g) * u; }},
                      thread, num_threads);
        rw::barrier();
        rw::gemv(down, intermediate_size, active, hidden_size, intermediate_size,
                 [&](int64_t i, float value) {{ out[i] = rw::from_float<Element>(value); }},
                 thread, num_threads);
    }});
}}
"""


def cases() -> Iterator[Case]:
    """Both dtypes; the dense block comes first, so that times are shares of its."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(dtype)


def _case(dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    size = INTERMEDIATE_SIZE, HIDDEN_SIZE
    one = torch.randn(3, *size, generator=generator).div(HIDDEN_SIZE**0.5).to(dtype)
    blocks = -(-BLOCKS_BYTES // one.nbytes)
    weights = one.repeat(blocks, 1, 1, 1)
    downs = one[2].T.repeat(blocks, 1, 1)  # for the dense block, whose rows are outputs
    gate, up, down = one
    x = torch.randn(1, HIDDEN_SIZE, generator=generator).to(dtype)
    at = itertools.cycle(range(blocks))
    tiny = one[:, :16, :32].contiguous()

    def dense() -> Tensor:
        block = next(at)
        return _dense(x, weights[block, 0], weights[block, 1], downs[block])

    def with_block(form: Callable[..., Tensor], kept: Any) -> Tensor:
        return form(x, *weights[next(at)], kept, activation="silu")

    def warm(form: Callable[..., Tensor], kept: Any) -> Tensor:
        return form(x[:, :32], *tiny, kept, activation="silu")

    def warm_dense() -> Tensor:
        return _dense(x[:, :32], tiny[0], tiny[1], tiny[2].T.contiguous())

    gated = torch.nn.functional.silu(x.float() @ gate.float().T)[0]
    everything = torch.arange(INTERMEDIATE_SIZE)
    candidates = [Candidate("dense", dense, float(one.nbytes), None, warm_dense)]
    for density in DENSITIES:
        for name, form, kept, indices in _forms(gated, density, generator):
            moved = cost(x, gate, down, len(indices), gate_is_dense=name != "given").bytes_moved
            expected = reference(x, gate, up, down, indices, activation="silu")
            call = functools.partial(with_block, form, kept)
            before = functools.partial(warm, form, kept[:0] if isinstance(kept, Tensor) else kept)
            candidates.append(Candidate(f"{name} {density:.2f}", call, moved, expected, before))
    return Case(
        kernel="gathered_mlp",
        name=f"{INTERMEDIATE_SIZE}x{HIDDEN_SIZE} {str(dtype).removeprefix('torch.')}",
        candidates=candidates,
        expected=reference(x, gate, up, down, everything, activation="silu"),
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        buffer=weights,
    )


def _forms(
    gated: Tensor, density: float, generator: torch.Generator
) -> Iterator[tuple[str, Callable[..., Tensor], Any, Tensor]]:
    """Name, launcher, its argument, and the neurons that it has to keep."""
    keep = int(density * INTERMEDIATE_SIZE)
    given = torch.randperm(INTERMEDIATE_SIZE, generator=generator)[:keep].sort().values
    largest = kept_largest(gated, keep)
    ordered = gated.abs().sort(descending=True).values
    threshold = ordered[keep - 1 : keep + 1].mean().item()  # between the last kept and the next
    yield "given", gathered_mlp, given, given
    yield "top-k", top_k_mlp, keep, largest
    yield "threshold", threshold_mlp, threshold, largest


def _dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    out = torch.empty_like(x)
    wide, active = torch.empty(gate.shape[1]), torch.empty(gate.shape[0])
    places = (t.data_ptr() for t in (x, gate, up, down, out, wide, active))
    _entry(x.dtype)(*places, *gate.shape, torch.get_num_threads())
    return out


@functools.cache
def _entry(dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    function = compile_library(inline_headers(_DENSE.format(type=CPP_TYPES[dtype]))).dense
    function.argtypes = [*[ctypes.c_void_p] * 7, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    function.restype = None
    return function
