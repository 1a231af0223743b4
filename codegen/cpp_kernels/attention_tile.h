// The two products of attention on one block of entries: scores of a few query rows, and their weighted sum
// of values. Rows and entries come by pointer, so that a cache may be contiguous, paged or gathered.
//
// Each key and value row leaves memory once; further query rows of the group find it in the first-level
// cache. Sums run in fp32.
#pragma once
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include "functions.h"

namespace rw {

constexpr int KV_BLOCK = 64;  // entries of one block: 32 KiB of fp32 keys at head_dim 128

// One vector of an entry. Compilers turn the generic conversion of bf16 into five instructions; it is two.
template <typename T> inline Vec load_entry(const T* p) { return load(p); }
#if defined(__AVX512F__) && defined(__AVX512BW__)
template <> inline Vec load_entry<bf16>(const bf16* p) {
    __m256i narrow = _mm256_loadu_si256((const __m256i*)p);
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}
#elif defined(__AVX2__)
template <> inline Vec load_entry<bf16>(const bf16* p) {
    __m128i narrow = _mm_loadu_si128((const __m128i*)p);
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
}
#endif

// The first COUNT numbers, the rest zero.
template <int COUNT, typename T> inline Vec load_first(const T* p) {
    if constexpr (COUNT == LANES) return load_entry(p);
    T padded[LANES] = {};
    std::memcpy(padded, p, COUNT * sizeof(T));
    return load_entry((const T*)padded);
}
template <int COUNT> inline void store_first(float* p, Vec v) { std::memcpy(p, &v, COUNT * 4); }

// Lanes of the 2 * LANES numbers of (a, b): from every group of WIDTH its half FIRST (0 or 1).
template <int WIDTH, int FIRST, size_t... LANE>
inline Vec halves(Vec a, Vec b, std::index_sequence<LANE...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(
        a, b, int(LANE / (WIDTH / 2) * WIDTH + LANE % (WIDTH / 2) + FIRST * (WIDTH / 2))...);
#else
    return __builtin_shuffle(
        a, b, VecI32{int(LANE / (WIDTH / 2) * WIDTH + LANE % (WIDTH / 2) + FIRST * (WIDTH / 2))...});
#endif
}

// Sums of LANES vectors as the lanes of one, in order: a tree of LANES - 1 additions, not LANES * LANES.
// Overwrites what it is given.
template <int WIDTH = LANES> inline Vec sums(Vec* v) {
    if constexpr (WIDTH == 1) {
        return v[0];
    } else {
        using Lanes = std::make_index_sequence<LANES>;
        for (int i = 0; i < WIDTH / 2; ++i)
            v[i] = halves<WIDTH, 0>(v[2 * i], v[2 * i + 1], Lanes{}) +
                   halves<WIDTH, 1>(v[2 * i], v[2 * i + 1], Lanes{});
        return sums<WIDTH / 2>(v);
    }
}

// f over all lanes of one vector, e.g. their sum.
template <int WIDTH = LANES, typename F> inline float fold(Vec v, F&& f) {
    if constexpr (WIDTH == 1) {
        return v[0];
    } else {
        using Lanes = std::make_index_sequence<LANES>;
        return fold<WIDTH / 2>(f(halves<WIDTH, 0>(v, v, Lanes{}), halves<WIDTH, 1>(v, v, Lanes{})), f);
    }
}

// Rows that are needed after the ones at hand: asked for line by line while those are computed with, so that
// memory never waits. A few lines at a time, as more than there are fill buffers would block the loads.
template <typename T, int WIDTH> struct Ahead {
    static constexpr int BYTES = WIDTH * int(sizeof(T));
    const T* const* rows;  // KV_BLOCK of them, or null

    void ask(int e, int begin, int end) const {
        if (!rows) return;
        for (int at = begin; at < end && at < BYTES; at += 64)
            __builtin_prefetch((const char*)rows[e] + at, 0, 2);
    }
};
struct NothingAhead {
    static constexpr int BYTES = 0;
    void ask(int, int, int) const {}
};

// Entries that a tile of ROWS query rows takes at once, so that its dot products fill one vector.
template <int ROWS> constexpr int tile_entries() { return LANES > ROWS ? LANES / ROWS : 1; }

// scores[r * KV_BLOCK + e] = scale * q[r * D ..] . keys[e], for ROWS rows and tile_entries<ROWS>() entries.
// In between asks for `tile_entries` rows of `next` from `ahead` on.
template <int D, int ROWS, typename Key, typename Next>
inline void score_tile(
    const float* q, const Key* const* keys, float scale, float* scores, const Next& next, int ahead) {
    constexpr int ENTRIES = tile_entries<ROWS>(), STEP = ENTRIES < 4 ? ENTRIES : 4;
    constexpr int WHOLE = D / LANES * LANES, REST = D - WHOLE;
    constexpr int COUNT = ROWS * ENTRIES > LANES ? ROWS * ENTRIES : LANES;
    Vec total[COUNT] = {};
    for (int e = 0; e < ENTRIES; e += STEP) {
        for (int c = 0; c < WHOLE; c += LANES) {
            constexpr int PART = D >= LANES ? (Next::BYTES * LANES / D + 63) / 64 * 64 : 0;
            int line = c / LANES * PART;
            for (int i = 0; i < STEP; ++i) next.ask(ahead + e + i, line, line + PART);
            Vec key[STEP];
            for (int i = 0; i < STEP; ++i) key[i] = load_entry(keys[e + i] + c);
            for (int r = 0; r < ROWS; ++r) {
                Vec query = load(q + r * D + c);
                for (int i = 0; i < STEP; ++i) total[r * ENTRIES + e + i] += query * key[i];
            }
        }
        if constexpr (REST > 0) {
            for (int i = 0; i < STEP; ++i) {
                Vec key = load_first<REST>(keys[e + i] + WHOLE);
                for (int r = 0; r < ROWS; ++r)
                    total[r * ENTRIES + e + i] += load_first<REST>(q + r * D + WHOLE) * key;
            }
        }
    }
    float result[COUNT];
    for (int i = 0; i < COUNT; i += LANES) store(result + i, sums(total + i) * splat(scale));
    for (int r = 0; r < ROWS; ++r)
        std::memcpy(scores + r * KV_BLOCK, result + r * ENTRIES, ENTRIES * sizeof(float));
}

template <int D, int ROWS, typename Key, typename Next>
inline void score_rows(
    const float* q, const Key* const* keys, int count, float scale, float* scores, const Next& next) {
    constexpr int ENTRIES = tile_entries<ROWS>();
    for (int e = 0; e < count; e += ENTRIES)
        score_tile<D, ROWS>(q, keys + e, scale, scores + e, next, e);
}

// Scores of `rows` query rows (D apart) and `count` entries. `keys` holds KV_BLOCK pointers that may all be
// read: those from `count` on give scores that mean nothing.
template <int D, typename Key, typename Next = NothingAhead>
inline void score_block(
    const float* q, int64_t rows, const Key* const* keys, int count, float scale, float* scores,
    const Next& next = {}) {
    int64_t r = 0;
    auto tile = [&](auto size, const auto& ahead) {
        score_rows<D, size>(q + r * D, keys, count, scale, scores + r * KV_BLOCK, ahead);
        r += size;
    };
    using std::integral_constant;
    if (rows >= 4) tile(integral_constant<int, 4>{}, next);
    while (r + 4 <= rows) tile(integral_constant<int, 4>{}, NothingAhead{});
    if (r == 0 && rows >= 2) tile(integral_constant<int, 2>{}, next);
    if (r + 2 <= rows) tile(integral_constant<int, 2>{}, NothingAhead{});
    if (r == 0 && rows == 1) tile(integral_constant<int, 1>{}, next);
    if (r < rows) tile(integral_constant<int, 1>{}, NothingAhead{});
}

// Columns [C, C + WIDTH) of total[r] = total[r] * keep[r] + sum of weights[r * KV_BLOCK + e] * values[e].
template <int DV, int C, int WIDTH, int ROWS, typename Value, typename Next>
inline void weigh_columns(
    const float* weights, const Value* const* values, int count, const float* keep, float* total,
    const Next& next) {
    constexpr int VECTORS = (WIDTH + LANES - 1) / LANES, REST = WIDTH - (VECTORS - 1) * LANES;
    Vec sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        float* row = total + r * DV + C;
        for (int i = 0; i < VECTORS - 1; ++i) sum[r][i] = load(row + i * LANES) * splat(keep[r]);
        sum[r][VECTORS - 1] = load_first<REST>(row + (VECTORS - 1) * LANES) * splat(keep[r]);
    }
    for (int e = 0; e < count; ++e) {
        next.ask(e, 0, Next::BYTES);
        Vec value[VECTORS];
        for (int i = 0; i < VECTORS - 1; ++i) value[i] = load_entry(values[e] + C + i * LANES);
        value[VECTORS - 1] = load_first<REST>(values[e] + C + (VECTORS - 1) * LANES);
        for (int r = 0; r < ROWS; ++r) {
            Vec weight = splat(weights[r * KV_BLOCK + e]);
            for (int i = 0; i < VECTORS; ++i) sum[r][i] += weight * value[i];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        float* row = total + r * DV + C;
        for (int i = 0; i < VECTORS - 1; ++i) store(row + i * LANES, sum[r][i]);
        store_first<REST>(row + (VECTORS - 1) * LANES, sum[r][VECTORS - 1]);
    }
}

// A tile of sums fills half of the registers: 16 of AVX-512's 32, 8 of AVX2's 16.
constexpr int SUM_VECTORS = LANES >= 16 ? 16 : 8;

template <int DV, int ROWS, int C, typename Value, typename Next>
inline void weigh_rows(
    const float* weights, const Value* const* values, int count, const float* keep, float* total,
    const Next& next) {
    if constexpr (C < DV) {
        constexpr int MOST = SUM_VECTORS / ROWS * LANES, WIDTH = DV - C < MOST ? DV - C : MOST;
        weigh_columns<DV, C, WIDTH, ROWS>(weights, values, count, keep, total, next);
        weigh_rows<DV, ROWS, C + WIDTH>(weights, values, count, keep, total, NothingAhead{});
    }
}

// total[r] = total[r] * keep[r] + sum over entries of weights[r * KV_BLOCK + e] * values[e], DV apart.
template <int DV, typename Value, typename Next = NothingAhead>
inline void weigh_block(
    const float* weights, int64_t rows, const Value* const* values, int count, const float* keep,
    float* total, const Next& next = {}) {
    // Narrow values are widened once for as many rows as there are; fp32 ones are read whole.
    constexpr int VECTORS = (DV + LANES - 1) / LANES;
    constexpr int TILE = sizeof(Value) < 4 || VECTORS * 4 <= SUM_VECTORS ? 4 : 2;
    int64_t r = 0;
    auto tile = [&](auto size, const auto& ahead) {
        weigh_rows<DV, size, 0>(weights + r * KV_BLOCK, values, count, keep + r, total + r * DV, ahead);
        r += size;
    };
    using std::integral_constant;
    if (rows >= TILE) tile(integral_constant<int, TILE>{}, next);
    while (r + TILE <= rows) tile(integral_constant<int, TILE>{}, NothingAhead{});
    if (r == 0 && rows >= 2) tile(integral_constant<int, 2>{}, next);
    while (r + 2 <= rows) tile(integral_constant<int, 2>{}, NothingAhead{});
    if (r == 0 && rows == 1) tile(integral_constant<int, 1>{}, next);
    if (r < rows) tile(integral_constant<int, 1>{}, NothingAhead{});
}

// scores[0 .. count) become e^(score - peak), and the numbers up to the next whole vector 0. `peak` and
// `total` are of all blocks so far, -inf and 0 before the first; `keep` is what older sums are worth now.
// False where these entries add nothing.
inline bool online_softmax(float* scores, int count, float& peak, float& total, float& keep) {
    int padded = (count + LANES - 1) / LANES * LANES;
    for (int i = count; i < padded; ++i) scores[i] = -INFINITY;
    Vec most = splat(peak);
    for (int i = 0; i < padded; i += LANES) {
        Vec score = load(scores + i);
        most = score > most ? score : most;
    }
    float highest = fold(most, [](Vec a, Vec b) { return a > b ? a : b; });
    float shift = highest == -INFINITY ? 0.0f : highest;  // nothing seen yet: -inf + inf would be NaN
    Vec sum = {};
    for (int i = 0; i < padded; i += LANES) {
        Vec weight = exp_(load(scores + i) - splat(shift));
        store(scores + i, weight);
        sum += weight;
    }
    keep = exp_(peak - shift);
    float added = fold(sum, [](Vec a, Vec b) { return a + b; });
    total = total * keep + added;
    peak = highest;
    return added != 0;
}

}  // namespace rw
