// Which pages of a cache the heads vote for: every head's softmax over the keys, summed over heads, reduced
// over pages; then the best pages.
//
//     vote_t = sum_h softmax_t(scale * q_h . k_{h / group_size, t}),   page = max or sum of its votes
//
// Keys are read once. Three phases with barriers between them, and `top_pages`. Source:
// https://arxiv.org/abs/2411.02886
#pragma once
#include <algorithm>
#include "attention_tile.h"

namespace rw {

struct PageShape {
    int64_t batch_size, num_kv_heads, group_size;
    int64_t first, last;  // entries that are asked about
    int64_t page_size;
    int64_t entries() const { return last > first ? last - first : 0; }
    int64_t blocks() const { return (entries() + KV_BLOCK - 1) / KV_BLOCK; }
    int64_t padded() const { return blocks() * KV_BLOCK; }
    int64_t pages() const { return (entries() + page_size - 1) / page_size; }
    int64_t heads() const { return num_kv_heads * group_size; }
};

// Floats of scratch memory: scores [batch, heads, padded], and a peak and a total of each block.
inline int64_t page_scratch(const PageShape& s) {
    return s.batch_size * s.heads() * (s.padded() + 2 * s.blocks());
}

// Phase one: scores of all entries, and the softmax's parts of each block. q: fp32 [batch, heads, D]; keys
// with strides, D contiguous.
template <int D, typename Key>
inline void page_products(
    const PageShape& shape, const float* q, const Key* k, int64_t k_batch, int64_t k_head, int64_t k_entry,
    float scale, float* scratch, int thread, int num_threads) {
    int64_t blocks = shape.blocks(), padded = shape.padded(), group = shape.group_size;
    float* parts = scratch + shape.batch_size * shape.heads() * padded;
    Range mine = share(shape.batch_size * shape.num_kv_heads * blocks, thread, num_threads);
    const Key *keys[KV_BLOCK], *next[KV_BLOCK];
    for (int64_t at = mine.begin; at < mine.end; ++at) {
        int64_t block = at % blocks, kv = at / blocks, b = kv / shape.num_kv_heads;
        int64_t start = block * KV_BLOCK, left = shape.entries() - start;
        int count = int(left < KV_BLOCK ? left : KV_BLOCK);
        const Key* from = k + b * k_batch + kv % shape.num_kv_heads * k_head + (shape.first + start) * k_entry;
        for (int e = 0; e < KV_BLOCK; ++e) {
            keys[e] = from + (e < count ? e : count - 1) * k_entry;
            next[e] = from + (KV_BLOCK + e < left ? KV_BLOCK + e : left - 1) * k_entry;
        }
        for (int64_t r = 0; r < group; r += 4) {
            float scores[4 * KV_BLOCK];
            int64_t rows = group - r < 4 ? group - r : 4;
            score_block<D>(q + (kv * group + r) * D, rows, keys, count, scale, scores,
                           Ahead<Key, D>{r == 0 ? next : nullptr});
            for (int64_t i = 0; i < rows; ++i) {
                int64_t head = kv * group + r + i;
                float peak = -INFINITY, total = 0, keep;
                std::memcpy(scratch + head * padded + start, scores + i * KV_BLOCK, count * sizeof(float));
                online_softmax(scores + i * KV_BLOCK, count, peak, total, keep);
                parts[(head * blocks + block) * 2] = peak, parts[(head * blocks + block) * 2 + 1] = total;
            }
        }
    }
}

// Phase two: the log-sum-exp of each head, in the place of its first block's peak.
inline void page_totals(const PageShape& shape, float* scratch, int thread, int num_threads) {
    int64_t blocks = shape.blocks();
    float* parts = scratch + shape.batch_size * shape.heads() * shape.padded();
    Range mine = share(shape.batch_size * shape.heads(), thread, num_threads);
    for (int64_t head = mine.begin; head < mine.end && blocks > 0; ++head) {
        float *part = parts + head * blocks * 2, highest = -INFINITY, total = 0;
        for (int64_t i = 0; i < blocks; ++i) highest = part[2 * i] > highest ? part[2 * i] : highest;
        for (int64_t i = 0; i < blocks; ++i) total += part[2 * i + 1] * exp_(part[2 * i] - highest);
        part[0] = highest + std::log(total);
    }
}

// Phase three: votes [batch, pages] of pages of page_size entries, counted from `first`.
inline void page_votes(
    const PageShape& shape, const float* scratch, bool largest_vote, float* votes, int thread,
    int num_threads) {
    int64_t pages = shape.pages(), padded = shape.padded(), heads = shape.heads(), blocks = shape.blocks();
    const float* parts = scratch + shape.batch_size * heads * padded;
    Range mine = share(shape.batch_size * pages, thread, num_threads, 16);
    for (int64_t at = mine.begin; at < mine.end;) {
        int64_t b = at / pages, stop = (b + 1) * pages < mine.end ? (b + 1) * pages : mine.end;
        int64_t t = at % pages * shape.page_size, end = (stop - b * pages) * shape.page_size;
        if (end > shape.entries()) end = shape.entries();
        for (int64_t i = at; i < stop; ++i) votes[i] = largest_vote ? -INFINITY : 0.0f;
        at = stop;
        for (; t < end; t += KV_BLOCK) {  // whatever the pages, so that loops are long
            float vote[KV_BLOCK] = {};
            int count = int(end - t < KV_BLOCK ? end - t : KV_BLOCK);
            for (int64_t head = b * heads; head < (b + 1) * heads; ++head) {
                const float* scores = scratch + head * padded + t;
                float lse = parts[head * blocks * 2];
                if (count == KV_BLOCK)
                    for (int e = 0; e < KV_BLOCK; ++e) vote[e] += exp_(scores[e] - lse);
                else
                    for (int e = 0; e < count; ++e) vote[e] += exp_(scores[e] - lse);
            }
            for (int e = 0; e < count; ++e) {
                float& page = votes[b * pages + (t + e) / shape.page_size];
                page = largest_vote ? (vote[e] > page ? vote[e] : page) : page + vote[e];
            }
        }
    }
}

// The `keep` pages with most votes, in ascending order; of equal ones the first. One batch row is one
// thread's. order: scratch of batch * pages numbers.
inline void top_pages(
    const float* votes, int64_t batch_size, int64_t pages, int64_t keep, int64_t* order, int64_t* chosen,
    int thread, int num_threads) {
    Range mine = share(batch_size, thread, num_threads);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
        const float* vote = votes + b * pages;
        int64_t* mine_order = order + b * pages;
        for (int64_t i = 0; i < pages; ++i) mine_order[i] = i;
        std::nth_element(mine_order, mine_order + keep, mine_order + pages, [=](int64_t i, int64_t j) {
            return vote[i] != vote[j] ? vote[i] > vote[j] : i < j;
        });
        std::sort(mine_order, mine_order + keep);
        for (int64_t i = 0; i < keep; ++i) chosen[b * keep + i] = mine_order[i];
    }
}

}  // namespace rw
