// Products of a few fp32 vectors with the rows of a matrix: each weight is read once, by one thread.
//
// A block of up to 8 rows is read side by side, one cache line of each at a time: more streams keep more
// reads in flight than one does, and x is loaded once for all of them. Lines further ahead are asked for
// early; at the end of a row those are the first ones of the block that comes next, wherever it is. Weights are fp32, bf16 or int8 and become fp32 in registers; sums are fp32.
#pragma once
#include "vec.h"
#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace rw {

// ---- One vector of weights, and the sum of one, in as few instructions as there are. Compilers turn the
// ---- generic conversions of narrow types into many.
template <typename W> inline Vec load_weights(const W* p) { return load(p); }
inline float add_lanes(Vec v);

#if defined(__AVX512F__) && defined(__AVX512BW__)
template <> inline Vec load_weights<bf16>(const bf16* p) {
    __m256i narrow = _mm256_loadu_si256((const __m256i*)p);
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}
template <> inline Vec load_weights<int8_t>(const int8_t* p) {
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline float add_lanes(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
#elif defined(__AVX2__)
template <> inline Vec load_weights<bf16>(const bf16* p) {
    __m128i narrow = _mm_loadu_si128((const __m128i*)p);
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
}
template <> inline Vec load_weights<int8_t>(const int8_t* p) {
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline float add_lanes(Vec v) {
    __m256 all = (__m256)v;
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float add_lanes(Vec v) { return sum(v); }
#endif

// What is tuned; a text that wants other values defines them first.
#ifndef RW_MOST_ROWS
#define RW_MOST_ROWS 8
#endif
#ifndef RW_AHEAD_BYTES
#define RW_AHEAD_BYTES 4096
#endif

// Rows of one block, so that its R * M sums stay in registers: 32 of them, or 16 with AVX2.
constexpr int rows_per_block(int vectors) {
    int rows = RW_MOST_ROWS, sums = LANES == 8 ? 12 : 24;
    while (rows > 1 && rows * vectors > sums) rows /= 2;
    return rows;
}

// What is asked for early, of all rows of a block together: fewer rows look further ahead.
constexpr int64_t LINE_BYTES = 64, AHEAD_BYTES = RW_AHEAD_BYTES;

// add(c) for vectors at c = 0, LANES, ... of R rows, a cache line of each row after the other; the lines ahead,
// and towards the end the beginnings of `next`, are on their way. Returns where less than a vector is left.
template <int R, typename W, typename Add>
inline int64_t read_side_by_side(const W* const (&rows)[R], const W* const (&next)[R], int64_t columns,
                                 Add&& add) {
    constexpr int64_t STEP = LINE_BYTES / sizeof(W), AHEAD = AHEAD_BYTES / R / sizeof(W);
    int64_t c = 0, whole = columns - columns % STEP;
    for (; c + AHEAD < whole; c += STEP) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) __builtin_prefetch(rows[r] + c + AHEAD);
#pragma GCC unroll 16
        for (int64_t u = 0; u < STEP; u += LANES) add(c + u);
    }
    for (int64_t ahead = 0; c < whole; c += STEP, ahead += STEP) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + ahead);
#pragma GCC unroll 16
        for (int64_t u = 0; u < STEP; u += LANES) add(c + u);
    }
    for (; c + LANES <= columns; c += LANES) add(c);
    return c;
}

// sums[r][m] = rows[r] . x[m] over `columns`.
template <int R, int M, typename W>
inline void dot_rows(const W* const (&rows)[R], const W* const (&next)[R], const float* x,
                     int64_t x_stride, int64_t columns, float (&sums)[R][M]) {
    Vec acc[R][M] = {};
    int64_t rest = read_side_by_side(rows, next, columns, [&](int64_t c) {
        Vec part[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) part[m] = load(x + m * x_stride + c);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Vec weights = load_weights(rows[r] + c);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) acc[r][m] += weights * part[m];
        }
    });
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
            sums[r][m] = add_lanes(acc[r][m]);
            for (int64_t c = rest; c < columns; ++c)
                sums[r][m] += to_float(rows[r][c]) * x[m * x_stride + c];
        }
}

// emit(i, m, value) for i of begin .. end in rising order, where row i begins at row_at(i). Behind `end` the
// rows from `later` on are asked for, as far as there are some before `last`.
template <int R, int M, typename RowAt, typename Emit>
inline void sweep_rows(int64_t begin, int64_t end, RowAt&& row_at, const float* x, int64_t x_stride,
                       int64_t columns, Emit&& emit, int64_t later = 0, int64_t last = 0) {
    int64_t i = begin;
    for (; i + R <= end; i += R) {
        decltype(row_at(i)) rows[R], next[R];
        for (int r = 0; r < R; ++r) {
            int64_t ahead = i + R + r < end ? i + R + r : later + (i + R + r - end);
            rows[r] = row_at(i + r);
            next[r] = row_at(ahead < last ? ahead : end - 1);
        }
        float sums[R][M];
        dot_rows<R, M>(rows, next, x, x_stride, columns, sums);
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) emit(i + r, m, sums[r][m]);
    }
    if constexpr (R > 1) sweep_rows<R / 2, M>(i, end, row_at, x, x_stride, columns, emit, later, last);
}

// wide [vectors, columns] = x in fp32; a phase of its own for activations that are narrower.
template <typename T>
inline void widen(const T* x, int64_t stride, float* wide, int64_t vectors, int64_t columns, int thread,
                  int num_threads) {
    Range mine = share(columns, thread, num_threads, LANES);
    for (int64_t m = 0; m < vectors; ++m)
        for (int64_t c = mine.begin; c < mine.end; ++c) wide[m * columns + c] = to_float(x[m * stride + c]);
}

// out(row, m, w[row] . x[m]) for M vectors x [M, columns]; w [rows, columns], both with a stride of rows.
// More than two vectors do not stay in the first cache, so 64 rows at a time meet a part of the columns.
// Where work is claimed in shares, `others` of them go to other threads before this one has its next.
template <int M, typename W, typename Out>
inline void gemm_rows(const W* w, int64_t stride, const float* x, int64_t x_stride, int64_t rows,
                      int64_t columns, Out&& out, int thread, int num_threads, int others = 0) {
    constexpr int R = rows_per_block(M);
    Range mine = share(rows, thread, num_threads, R);
    // GCC 12 makes one group of stores to out[m * rows + row] for several m, and writes back what it read
    // between them, over what another thread has stored there meanwhile: nothing may pass one store.
    auto apart = [&](int64_t row, int m, float value) {
        out(row, m, value);
        if constexpr (M > 1) asm volatile("" ::: "memory");
    };
    if constexpr (M <= 2) {
        auto row_at = [&](int64_t i) { return w + i * stride; };
        int64_t later = mine.end + others * (mine.end - mine.begin), last = others > 0 ? rows : 0;
        sweep_rows<R, M>(mine.begin, mine.end, row_at, x, x_stride, columns, apart, later, last);
    } else {
        constexpr int64_t PANEL = 64, PART = 8192 / M / 64 * 64;
        for (int64_t first = mine.begin; first < mine.end; first += PANEL) {
            float sums[PANEL][M] = {};
            int64_t count = mine.end - first < PANEL ? mine.end - first : PANEL;
            for (int64_t c = 0; c < columns; c += PART) {
                auto row_at = [&](int64_t i) { return w + (first + i) * stride + c; };
                auto add = [&](int64_t i, int m, float value) { sums[i][m] += value; };
                int64_t width = columns - c < PART ? columns - c : PART;
                sweep_rows<R, M>(0, count, row_at, x + c, x_stride, width, add);
            }
            for (int64_t i = 0; i < count; ++i)
                for (int m = 0; m < M; ++m) apart(first + i, m, sums[i][m]);
        }
    }
}

// out(row, w[row] . x) for one vector x [columns].
template <typename W, typename Out>
inline void gemv(const W* w, int64_t stride, const float* x, int64_t rows, int64_t columns, Out&& out,
                 int thread, int num_threads) {
    auto emit = [&](int64_t row, int, float value) { out(row, value); };
    gemm_rows<1>(w, stride, x, 0, rows, columns, emit, thread, num_threads);
}

// out(row, a[row] . x, b[row] . x) for two matrices of one shape, such as gate and up.
template <typename W, typename Out>
inline void gemv_pair(const W* a, const W* b, int64_t stride, const float* x, int64_t rows,
                      int64_t columns, Out&& out, int thread, int num_threads) {
    constexpr int R = rows_per_block(1);
    Range mine = share(2 * rows, thread, num_threads, R);
    auto row_at = [&](int64_t i) { return (i & 1 ? b : a) + (i >> 1) * stride; };
    float first = 0;
    auto emit = [&](int64_t i, int, float value) {
        if (i & 1)
            out(i >> 1, first, value);
        else
            first = value;
    };
    sweep_rows<R, 1>(mine.begin, mine.end, row_at, x, 0, columns, emit);
}

}  // namespace rw
