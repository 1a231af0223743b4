"""Families of small CPU kernels, in C++ within the loops of `cpu_loops`: what cost models learn from."""

from __future__ import annotations

import numpy as np

from ir_dataset.cost_models.cpu_loops import BINS, Arrays, Family, Shape

__all__ = ["FAMILIES"]


def _shapes(*sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(Shape(*size) for size in sizes)


_BOTH = (
    (16, 1024), (64, 256), (64, 2048), (128, 512), (256, 128), (256, 1024), (512, 512), (1024, 256),
    (32, 512), (128, 2048), (32, 4096), (2048, 128), (384, 384), (768, 768), (192, 1536), (1536, 256),
    (320, 320), (8, 8192), (640, 1280), (96, 896),
)  # fmt: skip
_MORE = (
    (8, 4096), (16, 512), (24, 1536), (40, 2560), (48, 1280), (64, 1024), (64, 4096), (80, 640),
    (112, 1792), (128, 1024), (144, 576), (160, 960), (208, 1664), (256, 512), (256, 2048), (288, 768),
    (352, 704), (384, 1152), (512, 256), (512, 1024), (576, 1088), (768, 384), (896, 448), (1024, 512),
)  # fmt: skip
_PLAIN = _shapes(*_BOTH, (512, 4096), (1024, 1024), (2048, 512), (4096, 128), *_MORE)
_FEW = _shapes(*_BOTH, (128, 4096), (1536, 128), (48, 640), (448, 1152), *_MORE)
_PRODUCTS = _shapes(
    (16, 256, 128), (64, 64, 64), (64, 256, 256), (128, 128, 128), (256, 64, 256), (32, 1024, 128),
    (128, 256, 512), (256, 256, 64), (64, 512, 512), (256, 256, 256), (8, 2048, 512), (512, 128, 128),
    (64, 128, 64), (192, 192, 192), (128, 512, 128), (512, 64, 512), (32, 256, 256), (96, 384, 384),
    (16, 1024, 256), (320, 320, 64), (64, 768, 192), (256, 128, 256), (128, 64, 1024), (48, 448, 320),
    (8, 1024, 1024), (16, 512, 256), (24, 640, 320), (32, 128, 128), (32, 512, 256), (48, 192, 192),
    (64, 128, 256), (64, 1024, 128), (80, 320, 320), (96, 192, 384), (128, 128, 256), (128, 256, 128),
    (128, 384, 192), (128, 1024, 128), (160, 320, 160), (192, 384, 128), (192, 256, 256), (256, 192, 192),
    (256, 256, 128), (256, 512, 128), (320, 128, 128), (384, 128, 192), (384, 192, 384), (512, 192, 64),
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
