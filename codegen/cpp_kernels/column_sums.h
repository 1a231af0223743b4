// How much attention every entry gets: column sums of the probabilities, which are computed again from the
// log-sum-exp, a tile at a time, and never stored.
//
//     sum[b, kv_head, j] = sum over query heads of the group and queries i of e^(score_ij - lse_i)
//
// Memory: one number for an entry. One thread takes whole blocks of entries, so nobody adds to another's.
// Source: https://arxiv.org/abs/2306.14048
#pragma once
#include "attention_scores.h"

namespace rw {

constexpr int SUM_ROWS = 16;  // query rows of a tile

// Queries [first, last) that may see an entry of [begin, end), where entries are at 0, 1, .. and queries are
// the last q_len of kv_len.
inline Range queries_seeing(
    Mask mask, int64_t span, int64_t q_len, int64_t kv_len, int64_t begin, int64_t end) {
    int64_t base = kv_len - q_len, first = 0, last = q_len;
    bool causal = mask == Mask::CAUSAL || mask == Mask::SLIDING_WINDOW || mask == Mask::CHUNKED ||
                  mask == Mask::SINKS_WINDOW;
    if (causal) first = begin - base;
    if (mask == Mask::SLIDING_WINDOW) last = end - 1 + span - base;
    if (mask == Mask::LOCAL) first = begin - span - base, last = end + span - base;
    first = first < 0 ? 0 : first;
    last = last > q_len ? q_len : last;
    return {first, last < first ? first : last};
}

// q: fp32 [batch, heads, q_len, D] and lse [batch, heads, q_len], contiguous; keys with strides. `score` as
// in attention_scores.h; `seeing(begin, end)` -> Range of queries; sums: fp32 [batch, kv_heads, kv_len].
template <int D, typename Key, typename Score, typename Seeing>
inline void column_sums(
    const AttentionShape& shape, int64_t kv_len, const float* q, const float* lse, const Key* k,
    int64_t k_batch, int64_t k_head, int64_t k_entry, const Score& score, float softmax_scale,
    const Seeing& seeing, float* sums, int thread, int num_threads) {
    int64_t blocks = (kv_len + KV_BLOCK - 1) / KV_BLOCK;
    const Key* keys[KV_BLOCK];
    // In turns: causal attention leaves little to do for the last blocks.
    for (int64_t at = thread; at < shape.batch_size * shape.num_kv_heads * blocks; at += num_threads) {
        int64_t block = at % blocks, kv = at / blocks, b = kv / shape.num_kv_heads;
        int64_t head = kv % shape.num_kv_heads, start = block * KV_BLOCK;
        int count = int(kv_len - start < KV_BLOCK ? kv_len - start : KV_BLOCK);
        const Key* from = k + b * k_batch + head * k_head + start * k_entry;
        for (int e = 0; e < KV_BLOCK; ++e) keys[e] = from + (e < count ? e : count - 1) * k_entry;
        Range queries = seeing(start, start + count);
        float column[KV_BLOCK] = {};
        for (int64_t g = 0; g < shape.group_size; ++g) {
            for (int64_t i = queries.begin; i < queries.end; i += SUM_ROWS) {
                float scores[SUM_ROWS * KV_BLOCK];
                int64_t row = g * shape.q_len + i, left = queries.end - i;
                int64_t rows = left < SUM_ROWS ? left : SUM_ROWS, at_row = kv * shape.rows() + row;
                score_block<D>(q + at_row * D, rows, keys, count, softmax_scale, scores);
                for (int64_t r = 0; r < rows; ++r) {
                    float *mine = scores + r * KV_BLOCK, total = lse[at_row + r];
                    score(b, head, row + r, start, count, mine);
                    if (total == -INFINITY) continue;  // saw nothing
                    for (int e = count; e < KV_BLOCK; ++e) mine[e] = -INFINITY;
                    for (int e = 0; e < KV_BLOCK; ++e) column[e] += exp_(mine[e] - total);
                }
            }
        }
        std::memcpy(sums + kv * kv_len + start, column, count * sizeof(float));
    }
}

}  // namespace rw
