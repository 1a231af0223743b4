// Attention of many requests whose caches begin alike: the shared prefix is read once for all of them, then
// each request's own entries, and the two are joined by their log-sum-exps.
//
// Phases, a barrier between any two:
//     fold_queries | decode_attention and its merge over the prefix, as one request with everybody's rows
//     | decode_attention and its merge over the suffixes, whose `out` is JoinPrefix
// Source: https://arxiv.org/abs/2402.05099
#pragma once
#include "decode_attention.h"

namespace rw {

// The prefix as one request: rows of KV head h are those of all requests, request after request.
inline AttentionShape folded_shape(const AttentionShape& s) {
    return {1, s.num_kv_heads, s.batch_size * s.group_size, s.q_len};
}

// q [batch, kv_heads, rows, D] to folded [kv_heads, batch, rows, D].
template <int D>
inline void fold_queries(
    const AttentionShape& shape, const float* q, float* folded, int thread, int num_threads) {
    int64_t size = shape.rows() * D;
    Range mine = share(shape.batch_size * shape.num_kv_heads, thread, num_threads);
    for (int64_t at = mine.begin; at < mine.end; ++at) {
        int64_t b = at / shape.num_kv_heads, head = at % shape.num_kv_heads;
        std::memcpy(folded + (head * shape.batch_size + b) * size, q + at * size, size * sizeof(float));
    }
}

// Keeps what the prefix gave to each folded row.
template <int DV> struct KeepPrefix {
    float *values, *lse;  // [kv_heads, batch, rows, DV] and without DV

    void operator()(int64_t row, const float* from, float row_lse) const {
        std::memcpy(values + row * DV, from, DV * sizeof(float));
        lse[row] = row_lse;
    }
};

// Joins what a suffix gave with what the prefix gave, and hands it on to out(row, values, lse).
template <int DV, typename Out> struct JoinPrefix {
    AttentionShape shape;
    const float *values, *lse;
    Out out;

    void operator()(int64_t row, const float* suffix, float suffix_lse) const {
        int64_t rows = shape.rows(), b = row / rows / shape.num_kv_heads;
        int64_t head = row / rows % shape.num_kv_heads;
        int64_t folded = (head * shape.batch_size + b) * rows + row % rows;
        float prefix_lse = lse[folded], highest = prefix_lse > suffix_lse ? prefix_lse : suffix_lse;
        float shift = highest == -INFINITY ? 0.0f : highest;
        float a = exp_(prefix_lse - shift), c = exp_(suffix_lse - shift), total = a + c;
        float scale = total == 0 ? 0.0f : 1.0f / total, joined[DV];
        const float* prefix = values + folded * DV;
        for (int i = 0; i < DV; ++i) joined[i] = (a * prefix[i] + c * suffix[i]) * scale;
        out(row, (const float*)joined, total == 0 ? -INFINITY : shift + std::log(total));
    }
};

}  // namespace rw
