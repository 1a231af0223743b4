"""Small CPU kernels as C++ text, each in many configurations: the loops that all families have in common.

All families share three loops, so that a knob means the same everywhere. Columns are walked in blocks,
rows in tiles of `rows`, and the columns of a block in strips of `unroll` vectors of `width` floats:

    for each block of columns: for each tile of rows: before; for each strip: inside; after

A thread has a share of the rows, or of the columns where rows depend on each other. Sizes are multiples
of 64 columns and 8 rows, so no configuration has a remainder. Accumulation is fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = [
    "CONFIGURATIONS",
    "DEFAULT",
    "Arrays",
    "Configuration",
    "Family",
    "Shape",
    "body_name",
    "make_arrays",
    "source",
]

BINS = 256
"""Of the histogram family."""


@dataclass(frozen=True, order=True)
class Configuration:
    """The knobs. `block` is in columns, 0 for all of them; `prefetch` in floats ahead, 0 for none."""

    rows: int
    unroll: int
    width: int
    block: int
    prefetch: int
    threads: int

    def as_dict(self) -> dict[str, int]:
        """Knobs by name."""
        return dict(vars(self))


CONFIGURATIONS = tuple(
    Configuration(rows, unroll, width, block, prefetch, threads)
    for rows, unroll, width, (block, prefetch), threads in itertools.product(
        (1, 2, 4), (1, 4), (8, 16), ((0, 0), (256, 0), (0, 256)), (1, 2)
    )
)
DEFAULT = Configuration(rows=4, unroll=1, width=16, block=0, prefetch=0, threads=2)
"""What one would write without measuring: rows side by side, the widest vectors, all cores."""


@dataclass(frozen=True, order=True)
class Shape:
    """`depth` is the length of inner products, 1 where there are none."""

    rows: int
    columns: int
    depth: int = 1


@dataclass(frozen=True)
class Arrays:
    """Inputs of one shape. a and b fp32, bytes int8, index int32, all contiguous; out is written."""

    a: np.ndarray
    b: np.ndarray
    bytes: np.ndarray
    index: np.ndarray
    out: np.ndarray
    scratch: np.ndarray


@dataclass(frozen=True)
class Family:
    """A kind of kernel.

    Attributes:
        by_columns: threads share columns instead of rows.
        scattered: `out` is written down its columns, a line for each.
        before, inside, after: C++ of the three places; see the module and `_BODY` for the names.
        reference: the same in numpy, from arrays and a shape to `out`, flattened.
        flops: for each element of rows x columns x depth.
        read, written: bytes for each element of rows x columns, as they cross the caches once.
        shapes: that are measured.
    """

    name: str
    inside: str
    reference: Callable[[Arrays, Shape], np.ndarray]
    before: str = ""
    after: str = ""
    by_columns: bool = False
    scattered: bool = False
    flops: float = 2.0
    read: float = 4.0
    written: float = 0.0
    shapes: tuple[Shape, ...] = ()


_PRELUDE = """\
#include <cmath>
#include <cstdint>
#include <cstring>

struct Arrays {
    const float *a, *b;
    const int8_t* bytes;
    const int32_t* index;
    float *out, *scratch;
    int64_t rows, columns, depth;
};

template <int W> struct Lanes {
    typedef float Floats __attribute__((vector_size(W * 4)));
    typedef int8_t Bytes __attribute__((vector_size(W)));
};
template <class V> inline V load(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }
template <class V> inline float add_up(V v) {
    float total = 0;
    for (unsigned i = 0; i < sizeof(V) / 4; ++i) total += v[i];
    return total;
}
template <class V> inline V larger(V a, V b) { return a > b ? a : b; }
template <class V> inline V smaller(V a, V b) { return a < b ? a : b; }
template <class V> inline float largest(V v) {
    float most = v[0];
    for (unsigned i = 1; i < sizeof(V) / 4; ++i) most = v[i] > most ? v[i] : most;
    return most;
}
// exp(x) for x <= 0: (1 + x / 1024 + ...)^1024 by ten squarings, with a relative error below 1e-3.
template <class V> inline V exp_below(V x) {
    V small = larger(x, V{} - 80.0f) * (1.0f / 1024), e = 1.0f + small * (1.0f + small * 0.5f);
    for (int i = 0; i < 10; ++i) e *= e;
    return e;
}
template <int AHEAD> inline void ahead(const void* p) {
    if (AHEAD) __builtin_prefetch((const float*)p + AHEAD);
}
"""
_DRIVER = """
#include <chrono>
#include "parallel.h"

typedef void Body(const Arrays&, int64_t, int64_t);

// Shares of `items` in multiples of `grain` among the threads.
extern "C" void run(Body* body, const Arrays& arrays, int64_t items, int64_t grain, int threads) {
    rw::parallel(threads, [&](int thread, int num_threads) {
        int64_t parts = items / grain;
        int64_t begin = parts * thread / num_threads, end = parts * (thread + 1) / num_threads;
        if (begin < end) body(arrays, begin * grain, end * grain);
    });
}

// The least seconds of one run, of at least 3 and of as many as fit into `budget_s`.
extern "C" double least_seconds(Body* body, const Arrays& arrays, int64_t items, int64_t grain,
                                int threads, double budget_s) {
    using Clock = std::chrono::steady_clock;
    double least = 1e9, spent = 0;
    for (int i = 0; i < 3 || spent < budget_s; ++i) {
        auto start = Clock::now();
        run(body, arrays, items, grain, threads);
        double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        if (i > 0 && seconds < least) least = seconds;
        spent += seconds;
    }
    return least;
}
"""
_BODY = """
template <int ROWS, int UNROLL, int WIDTH, int BLOCK, int AHEAD>
inline __attribute__((always_inline)) void body(const Arrays& t, int64_t begin, int64_t end) {{
    typedef typename Lanes<WIDTH>::Floats V;
    constexpr int STRIP = UNROLL * WIDTH;
    const int64_t columns = t.columns, depth = t.depth, rows = t.rows;
    const int64_t row_begin = {row_begin}, row_end = {row_end};
    const int64_t column_begin = {column_begin}, column_end = {column_end};
    const float *a = t.a, *b = t.b;
    const int8_t* bytes = t.bytes;
    const int32_t* index = t.index;
    float *__restrict out = t.out, *__restrict scratch = t.scratch;
    (void)depth, (void)rows, (void)a, (void)b, (void)bytes, (void)index, (void)out, (void)scratch;
    const int64_t block = BLOCK ? BLOCK : column_end - column_begin;
    for (int64_t first = column_begin; first < column_end; first += block) {{
        const int64_t last = first + block < column_end ? first + block : column_end;
        for (int64_t r = row_begin; r < row_end; r += ROWS) {{
{before}            for (int64_t c = first; c < last; c += STRIP) {{
{inside}            }}
{after}        }}
    }}
}}
"""
_INSTANCE = """\
extern "C" __attribute__((noinline)) void {name}(const Arrays& t, int64_t begin, int64_t end) {{
    body<{rows}, {unroll}, {width}, {block}, {prefetch}>(t, begin, end);
}}
"""


def body_name(configuration: Configuration) -> str:
    """The C name of a configuration's body; threads are an argument of `run`."""
    c = configuration
    return f"body_r{c.rows}_u{c.unroll}_w{c.width}_b{c.block}_p{c.prefetch}"


def source(
    family: Family,
    configurations: tuple[Configuration, ...] = CONFIGURATIONS,
    *,
    driver: bool = True,
) -> str:
    """C++ text with one body for each configuration.

    Args:
        driver: add `run` and `least_seconds`, which include codegen's `parallel.h`.
    """
    by_rows = ("begin", "end", "0", "columns")
    by_columns = ("0", "rows", "begin", "end")
    ranges = by_columns if family.by_columns else by_rows
    names = ("row_begin", "row_end", "column_begin", "column_end")
    body = _BODY.format(
        before=_indented(family.before, 12),
        inside=_indented(family.inside, 16),
        after=_indented(family.after, 12),
        **dict(zip(names, ranges, strict=True)),
    )
    instances = {
        body_name(c): _INSTANCE.format(name=body_name(c), **vars(c)) for c in configurations
    }
    return (
        _PRELUDE + _DRIVER * driver + body + "".join(instances[name] for name in sorted(instances))
    )


def make_arrays(shape: Shape, seed: int = 0) -> Arrays:
    """Inputs for any family, with a row and a column more than asked for on each side of `a`.

    Each array begins at a place of its own within a page, on a cache line: where they lie by chance,
    loads that cross lines and stores that meet loads at the same offset decide which knobs win.
    """
    random = np.random.default_rng([seed, shape.rows, shape.columns, shape.depth])
    wide = max(shape.columns, shape.depth)
    cells = (shape.rows + 2) * (wide + 64)
    second = max(shape.depth * wide, shape.rows) + 64
    return Arrays(
        a=_placed(random.standard_normal(cells, np.float32), 0),
        b=_placed(random.standard_normal(second, np.float32), 1024),
        bytes=_placed(random.integers(-127, 127, cells, np.int8), 512),
        index=_placed(random.integers(0, min(BINS, shape.rows), cells, np.int32), 1536),
        out=_placed(np.zeros(max(cells, shape.rows * BINS), np.float32), 2048),
        scratch=_placed(np.zeros(shape.rows, np.float32), 3072),
    )


def _placed(values: np.ndarray, offset: int) -> np.ndarray:
    """A copy that begins `offset` bytes into a page."""
    memory = np.empty(values.nbytes + 8192, np.uint8)
    begin = -memory.ctypes.data % 4096 + offset
    placed = memory[begin : begin + values.nbytes].view(values.dtype)
    placed[:] = values
    return placed


def _indented(text: str, spaces: int) -> str:
    return "".join(f"{' ' * spaces}{line}\n" for line in text.strip("\n").splitlines())
