"""Families of small CPU kernels as C++ text, each in many configurations: what cost models learn from.

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
    "FAMILIES",
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


def _shapes(*sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(Shape(*size) for size in sizes)


_BOTH = (
    (16, 1024), (64, 256), (64, 2048), (128, 512), (256, 128), (256, 1024), (512, 512), (1024, 256),
    (32, 512), (128, 2048), (32, 4096), (2048, 128), (384, 384), (768, 768), (192, 1536), (1536, 256),
    (320, 320), (8, 8192), (640, 1280), (96, 896),
)  # fmt: skip
_PLAIN = _shapes(*_BOTH, (512, 4096), (1024, 1024), (2048, 512), (4096, 128))
_FEW = _shapes(*_BOTH, (128, 4096), (1536, 128), (48, 640), (448, 1152))
_PRODUCTS = _shapes(
    (16, 256, 128), (64, 64, 64), (64, 256, 256), (128, 128, 128), (256, 64, 256), (32, 1024, 128),
    (128, 256, 512), (256, 256, 64), (64, 512, 512), (256, 256, 256), (8, 2048, 512), (512, 128, 128),
    (64, 128, 64), (192, 192, 192), (128, 512, 128), (512, 64, 512), (32, 256, 256), (96, 384, 384),
    (16, 1024, 256), (320, 320, 64), (64, 768, 192), (256, 128, 256), (128, 64, 1024), (48, 448, 320),
)  # fmt: skip


def _a(t: Arrays, s: Shape) -> np.ndarray:
    return t.a[: s.rows * s.columns].reshape(s.rows, s.columns)


def _scan(t: Arrays, s: Shape) -> np.ndarray:
    out = _a(t, s).copy()
    for row in range(1, s.rows):
        out[row] += np.float32(0.9) * out[row - 1]
    return out


def _stencil(t: Arrays, s: Shape) -> np.ndarray:
    wide = s.columns + 64
    a = t.a[: (s.rows + 2) * wide].reshape(s.rows + 2, wide)
    inner = slice(1, s.rows + 1), slice(32, 32 + s.columns)
    left, right = (a[inner[0], 32 + d : 32 + d + s.columns] for d in (-1, 1))
    above, below = a[0 : s.rows, inner[1]], a[2 : s.rows + 2, inner[1]]
    return 0.25 * (left + right + above + below) - a[inner]


def _softmax(t: Arrays, s: Shape) -> np.ndarray:
    e = np.exp(_a(t, s) - _a(t, s).max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _rms_norm(t: Arrays, s: Shape) -> np.ndarray:
    a = _a(t, s)
    return a / np.sqrt((a * a).mean(1, keepdims=True) + 1e-6) * t.b[: s.columns]


def _histogram(t: Arrays, s: Shape) -> np.ndarray:
    index = t.index[: s.rows * s.columns].reshape(s.rows, s.columns)
    return np.stack([np.bincount(row, minlength=BINS) for row in index])


def _polynomial(t: Arrays, s: Shape) -> np.ndarray:
    x = _a(t, s) * np.float32(0.25)
    total = np.full_like(x, 0.1)
    for _ in range(12):
        total = total * x + np.float32(0.5)
    return total


_SUMS = "V acc[ROWS][UNROLL] = {};"
_STORE_SUMS = """
for (int i = 0; i < ROWS; ++i) {
    V total = {};
    for (int u = 0; u < UNROLL; ++u) total += acc[i][u];
    out[r + i] = (first > 0 ? out[r + i] : 0.0f) + add_up(total);
}"""

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "gemv",
            before=_SUMS,
            inside="""
for (int u = 0; u < UNROLL; ++u) {
    V x = load<V>(b + c + u * WIDTH);
    for (int i = 0; i < ROWS; ++i) {
        const float* p = a + (r + i) * columns + c + u * WIDTH;
        ahead<AHEAD>(p);
        acc[i][u] += load<V>(p) * x;
    }
}""",
            after=_STORE_SUMS,
            reference=lambda t, s: _a(t, s) @ t.b[: s.columns],
            shapes=_PLAIN,
        ),
        Family(
            "gemv_int8",
            before=_SUMS,
            inside="""
for (int u = 0; u < UNROLL; ++u) {
    V x = load<V>(b + c + u * WIDTH);
    for (int i = 0; i < ROWS; ++i) {
        const int8_t* p = bytes + (r + i) * columns + c + u * WIDTH;
        ahead<AHEAD>(p);
        acc[i][u] += __builtin_convertvector(load<typename Lanes<WIDTH>::Bytes>(p), V) * x;
    }
}""",
            after=_STORE_SUMS,
            reference=lambda t, s: (
                t.bytes[: s.rows * s.columns].reshape(s.rows, s.columns).astype(np.float32)
                @ t.b[: s.columns]
            ),
            read=1.0,
            shapes=_PLAIN,
        ),
        Family(
            "gather_rows",
            by_columns=True,
            inside="""
for (int u = 0; u < UNROLL; ++u) {
    V total = r > 0 ? load<V>(out + c + u * WIDTH) : V{};
    for (int i = 0; i < ROWS; ++i) {
        const float* p = a + index[r + i] * columns + c + u * WIDTH;
        ahead<AHEAD>(p);
        total += b[r + i] * load<V>(p);
    }
    store(out + c + u * WIDTH, total);
}""",
            reference=lambda t, s: t.b[: s.rows] @ _a(t, s)[t.index[: s.rows]],
            shapes=_PLAIN,
        ),
        Family(
            "column_sums",
            by_columns=True,
            inside="""
for (int u = 0; u < UNROLL; ++u) {
    V total = r > 0 ? load<V>(out + c + u * WIDTH) : V{};
    for (int i = 0; i < ROWS; ++i) {
        const float* p = a + (r + i) * columns + c + u * WIDTH;
        ahead<AHEAD>(p);
        total += load<V>(p);
    }
    store(out + c + u * WIDTH, total);
}""",
            reference=lambda t, s: _a(t, s).sum(0),
            flops=1.0,
            shapes=_PLAIN,
        ),
        Family(
            "scan",
            by_columns=True,
            inside="""
for (int u = 0; u < UNROLL; ++u) {
    V state = r > 0 ? load<V>(out + (r - 1) * columns + c + u * WIDTH) : V{};
    for (int i = 0; i < ROWS; ++i) {
        const float* p = a + (r + i) * columns + c + u * WIDTH;
        ahead<AHEAD>(p);
        state = state * 0.9f + load<V>(p);
        store(out + (r + i) * columns + c + u * WIDTH, state);
    }
}""",
            reference=_scan,
            written=4.0,
            shapes=_FEW,
        ),
        Family(
            "stencil",
            inside="""
const int64_t wide = columns + 64;
for (int u = 0; u < UNROLL; ++u) {
    const float* p = a + r * wide + 32 + c + u * WIDTH;
    V above = load<V>(p), here = load<V>(p + wide);
    for (int i = 0; i < ROWS; ++i) {
        const float* q = p + (i + 1) * wide;
        ahead<AHEAD>(q + wide);
        V below = load<V>(q + wide);
        V beside = load<V>(q - 1) + load<V>(q + 1);
        store(out + (r + i) * columns + c + u * WIDTH, 0.25f * (beside + above + below) - here);
        above = here, here = below;
    }
}""",
            reference=_stencil,
            flops=6.0,
            written=4.0,
            shapes=_FEW,
        ),
        Family(
            "gated_product",
            inside="""
for (int u = 0; u < UNROLL; ++u) {
    V scale = load<V>(b + c + u * WIDTH);
    for (int i = 0; i < ROWS; ++i) {
        const int64_t at = (r + i) * columns + c + u * WIDTH;
        ahead<AHEAD>(a + at);
        V x = load<V>(a + at) * scale;
        store(out + at, x * x / (1.0f + x * x));
    }
}""",
            reference=lambda t, s: (
                (_a(t, s) * t.b[: s.columns]) ** 2 / (1 + (_a(t, s) * t.b[: s.columns]) ** 2)
            ),
            flops=5.0,
            written=4.0,
            shapes=_FEW,
        ),
        Family(
            "polynomial",
            inside="""
V x[ROWS][UNROLL], total[ROWS][UNROLL];
for (int i = 0; i < ROWS; ++i)
    for (int u = 0; u < UNROLL; ++u) {
        const float* p = a + (r + i) * columns + c + u * WIDTH;
        ahead<AHEAD>(p);
        x[i][u] = load<V>(p) * 0.25f, total[i][u] = V{} + 0.1f;
    }
for (int k = 0; k < 12; ++k)
    for (int i = 0; i < ROWS; ++i)
        for (int u = 0; u < UNROLL; ++u) total[i][u] = total[i][u] * x[i][u] + 0.5f;
for (int i = 0; i < ROWS; ++i)
    for (int u = 0; u < UNROLL; ++u) store(out + (r + i) * columns + c + u * WIDTH, total[i][u]);""",
            reference=_polynomial,
            flops=25.0,
            written=4.0,
            shapes=_FEW,
        ),
        Family(
            "softmax",
            before="""
if (first == column_begin) {
    V most[ROWS], sums[ROWS] = {};
    float limit[ROWS];
    for (int i = 0; i < ROWS; ++i) most[i] = load<V>(a + (r + i) * columns);
    for (int64_t c = 0; c < columns; c += STRIP)
        for (int u = 0; u < UNROLL; ++u)
            for (int i = 0; i < ROWS; ++i)
                most[i] = larger(most[i], load<V>(a + (r + i) * columns + c + u * WIDTH));
    for (int i = 0; i < ROWS; ++i) limit[i] = largest(most[i]);
    for (int64_t c = 0; c < columns; c += STRIP)
        for (int u = 0; u < UNROLL; ++u)
            for (int i = 0; i < ROWS; ++i) {
                const int64_t at = (r + i) * columns + c + u * WIDTH;
                V e = exp_below(load<V>(a + at) - limit[i]);
                sums[i] += e;
                store(out + at, e);
            }
    for (int i = 0; i < ROWS; ++i) scratch[r + i] = 1.0f / add_up(sums[i]);
}""",
            inside="""
for (int u = 0; u < UNROLL; ++u)
    for (int i = 0; i < ROWS; ++i) {
        float* p = out + (r + i) * columns + c + u * WIDTH;
        ahead<AHEAD>(p);
        store(p, load<V>(p) * scratch[r + i]);
    }""",
            reference=_softmax,
            flops=18.0,
            read=8.0,
            written=8.0,
            shapes=_FEW,
        ),
        Family(
            "rms_norm",
            before="""
if (first == column_begin) {
    V sums[ROWS][UNROLL] = {};
    for (int64_t c = 0; c < columns; c += STRIP)
        for (int u = 0; u < UNROLL; ++u)
            for (int i = 0; i < ROWS; ++i) {
                V x = load<V>(a + (r + i) * columns + c + u * WIDTH);
                sums[i][u] += x * x;
            }
    for (int i = 0; i < ROWS; ++i) {
        V total = {};
        for (int u = 0; u < UNROLL; ++u) total += sums[i][u];
        scratch[r + i] = 1.0f / std::sqrt(add_up(total) / columns + 1e-6f);
    }
}""",
            inside="""
for (int u = 0; u < UNROLL; ++u) {
    V scale = load<V>(b + c + u * WIDTH);
    for (int i = 0; i < ROWS; ++i) {
        const int64_t at = (r + i) * columns + c + u * WIDTH;
        ahead<AHEAD>(a + at);
        store(out + at, load<V>(a + at) * scratch[r + i] * scale);
    }
}""",
            reference=_rms_norm,
            flops=4.0,
            read=8.0,
            written=4.0,
            shapes=_FEW,
        ),
        Family(
            "transpose",
            scattered=True,
            inside="""
for (int u = 0; u < UNROLL; ++u)
    for (int i = 0; i < ROWS; ++i) {
        const float* p = a + (r + i) * columns + c + u * WIDTH;
        ahead<AHEAD>(p);
        V x = load<V>(p);
        for (int w = 0; w < WIDTH; ++w) out[(c + u * WIDTH + w) * rows + r + i] = x[w];
    }""",
            reference=lambda t, s: _a(t, s).T,
            flops=0.0,
            written=4.0,
            shapes=_FEW,
        ),
        Family(
            "matmul",
            inside="""
V acc[ROWS][UNROLL] = {};
for (int64_t k = 0; k < depth; ++k)
    for (int u = 0; u < UNROLL; ++u) {
        const float* p = b + k * columns + c + u * WIDTH;
        ahead<AHEAD>(p);
        V x = load<V>(p);
        for (int i = 0; i < ROWS; ++i) acc[i][u] += a[(r + i) * depth + k] * x;
    }
for (int i = 0; i < ROWS; ++i)
    for (int u = 0; u < UNROLL; ++u) store(out + (r + i) * columns + c + u * WIDTH, acc[i][u]);""",
            reference=lambda t, s: (
                t.a[: s.rows * s.depth].reshape(s.rows, s.depth)
                @ t.b[: s.depth * s.columns].reshape(s.depth, s.columns)
            ),
            written=4.0,
            shapes=_PRODUCTS,
        ),
        Family(
            "histogram",
            before=f"""
if (first == column_begin) memset(out + r * {BINS}, 0, ROWS * {BINS} * 4);""",
            inside=f"""
for (int u = 0; u < UNROLL; ++u)
    for (int w = 0; w < WIDTH; ++w)
        for (int i = 0; i < ROWS; ++i) {{
            const int32_t* p = index + (r + i) * columns + c + u * WIDTH + w;
            if (w == 0) ahead<AHEAD>(p);
            out[(r + i) * {BINS} + *p] += 1.0f;
        }}""",
            reference=_histogram,
            flops=1.0,
            shapes=_FEW,
        ),
        Family(
            "rank_one",
            inside="""
for (int u = 0; u < UNROLL; ++u) {
    V x = load<V>(b + c + u * WIDTH);
    for (int i = 0; i < ROWS; ++i) {
        float* p = out + (r + i) * columns + c + u * WIDTH;
        ahead<AHEAD>(p);
        store(p, x * a[r + i]);
    }
}""",
            reference=lambda t, s: np.outer(t.a[: s.rows], t.b[: s.columns]),
            flops=1.0,
            read=0.0,
            written=4.0,
            shapes=_FEW,
        ),
    )
}
