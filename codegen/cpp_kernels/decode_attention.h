// Attention of one or a few new tokens over cached entries; every key and value is read once for all query
// heads of its group, by one thread, front to back.
//
//     out = sum_j p_j v_j,   p = softmax(score(scale * q . k_j)),   lse = log sum_j e^score_j
//
// Threads share the blocks of KV_BLOCK entries of all (batch, KV head) evenly. Where a share ends within a
// KV head, its part stays in scratch memory and `decode_attention_merge`, behind a barrier, joins the parts.
// Sources: https://arxiv.org/abs/1805.02867 (online softmax), https://arxiv.org/abs/2205.14135.
#pragma once
#include "attention_entries.h"
#include "attention_scores.h"
#include "attention_tile.h"

namespace rw {

inline int64_t attention_part(int64_t rows, int dv) { return (rows * (dv + 2) + 15) / 16 * 16; }
inline int64_t attention_thread_scratch(int64_t rows, int dv) {
    return 2 * attention_part(rows, dv) + rows * KV_BLOCK + (rows + 15) / 16 * 16;
}
// Floats of scratch memory.
inline int64_t attention_scratch(int64_t rows, int dv, int num_threads) {
    return num_threads * attention_thread_scratch(rows, dv);
}

// Sums of one KV head's rows over some of its entries, where one thread left them.
struct AttentionPart {
    float *sums, *peak, *total;
    AttentionPart(float* memory, int64_t rows, int dv)
        : sums(memory), peak(memory + rows * dv), total(peak + rows) {}
};

// Divides, lets the sinks (logits [num_heads] that only count in the denominator) join, and hands on:
// out(row of [batch, num_heads, q_len], const float values[DV], float lse). Who sees nothing gives zeros and
// lse = -inf. The lse counts a sink in.
template <int DV, typename Out>
inline void finish_attention(
    const AttentionShape& shape, int64_t batch, int64_t kv_head, AttentionPart part, const float* sinks,
    const Out& out) {
    int64_t rows = shape.rows(), first = (batch * shape.num_kv_heads + kv_head) * rows;
    for (int64_t r = 0; r < rows; ++r) {
        float peak = part.peak[r], total = part.total[r], scale = 1.0f;
        if (sinks) {
            float sink = sinks[kv_head * shape.group_size + r / shape.q_len];
            float highest = sink > peak ? sink : peak;
            if (highest > -INFINITY) {
                scale = exp_(peak - highest);
                total = total * scale + exp_(sink - highest);
                peak = highest;
            }
        }
        scale = total == 0 ? 0.0f : scale / total;
        float* values = part.sums + r * DV;
        for (int c = 0; c < DV; ++c) values[c] *= scale;
        out(first + r, (const float*)values, total == 0 ? -INFINITY : peak + std::log(total));
    }
}

// Calls f(batch, kv_head, block begin, block end, blocks of that KV head) for every KV head that the share
// of a thread touches.
template <typename Visible, typename F>
inline void each_attention_item(
    const AttentionShape& shape, const Visible& visible, int thread, int num_threads, F&& f) {
    int64_t all = 0;
    for (int64_t b = 0; b < shape.batch_size; ++b) all += shape.num_kv_heads * visible(b).blocks();
    Range mine = share(all, thread, num_threads);
    for (int64_t b = 0, at = 0; b < shape.batch_size && at < mine.end; ++b) {
        int64_t blocks = visible(b).blocks();
        for (int64_t head = 0; head < shape.num_kv_heads; ++head, at += blocks) {
            int64_t begin = mine.begin > at ? mine.begin - at : 0;
            int64_t end = mine.end - at < blocks ? mine.end - at : blocks;
            if (begin < end) f(b, head, begin, end, blocks);
        }
    }
}

// Phase one. q: fp32 [batch, num_heads, q_len, D], contiguous. Entries, Score: see above.
// visible(batch) -> Spans; out: as in `finish_attention`; scratch: `attention_scratch` floats.
template <int D, int DV, typename Entries, typename Visible, typename Score, typename Out>
inline void decode_attention(
    const AttentionShape& shape, const float* q, const Entries& entries, const Visible& visible,
    const Score& score, float softmax_scale, const float* sinks, float* scratch, const Out& out, int thread,
    int num_threads) {
    int64_t rows = shape.rows(), part_size = attention_part(rows, DV);
    float* mine = scratch + thread * attention_thread_scratch(rows, DV);
    float *scores = mine + 2 * part_size, *keep = scores + rows * KV_BLOCK;
    using Key = typename Entries::Key;
    using Value = typename Entries::Value;
    const Key* keys[KV_BLOCK];
    const Value* values[2][KV_BLOCK];  // of this block and of the next
    int slot = 0;
    auto item = [&](int64_t b, int64_t head, int64_t begin, int64_t end, int64_t blocks) {
        AttentionPart part(mine + slot * part_size, rows, DV);
        for (int64_t i = 0; i < rows * DV; ++i) part.sums[i] = 0;
        for (int64_t r = 0; r < rows; ++r) part.peak[r] = -INFINITY, part.total[r] = 0;
        const float* query = q + (b * shape.num_kv_heads + head) * rows * D;
        Spans spans = visible(b);
        int64_t first = 0;
        auto find = [&](int64_t block, const Value** to) {  // entries of a block, and how many
            int range = block >= spans.blocks(0);
            first = spans.first[range] + (block - (range ? spans.blocks(0) : 0)) * KV_BLOCK;
            int64_t left = block < end ? spans.last[range] - first : 0;
            int count = int(left < KV_BLOCK ? left : KV_BLOCK);
            if (count <= 0) return 0;
            entries.rows(b, head, first, count, thread, keys, to);
            for (int e = count; e < KV_BLOCK; ++e) keys[e] = keys[count - 1], to[e] = to[count - 1];
            return count;
        };
        int count = find(begin, values[0]), now = 0;
        for (int64_t block = begin; count > 0; ++block, now = 1 - now) {
            score_block<D>(query, rows, keys, count, softmax_scale, scores, Ahead<Value, DV>{values[now]});
            bool any = false;
            for (int64_t r = 0; r < rows; ++r) {
                score(b, head, r, first, count, scores + r * KV_BLOCK);
                any |= online_softmax(scores + r * KV_BLOCK, count, part.peak[r], part.total[r], keep[r]);
            }
            int next = find(block + 1, values[1 - now]);
            Ahead<Key, D> ahead{next ? keys : nullptr};
            if (any) weigh_block<DV>(scores, rows, values[now], count, keep, part.sums, ahead);
            count = next;
        }
        if (begin == 0 && end == blocks)
            finish_attention<DV>(shape, b, head, part, sinks, out);
        else
            slot = 1;  // the other end of this share may be a part, too
    };
    each_attention_item(shape, visible, thread, num_threads, item);
}

// Phase two, after a barrier: joins the parts of the KV heads that several threads had. The thread that had
// a KV head's first blocks does it. Not needed where batch_size * num_kv_heads is a multiple of num_threads
// and all batch rows see the same number of blocks.
template <int DV, typename Visible, typename Out>
inline void decode_attention_merge(
    const AttentionShape& shape, const Visible& visible, const float* sinks, float* scratch, const Out& out,
    int thread, int num_threads) {
    int64_t rows = shape.rows(), part_size = attention_part(rows, DV);
    int64_t thread_size = attention_thread_scratch(rows, DV);
    int64_t last_b = -1, last_head = -1;  // the only KV head of this share that goes on in the next one
    int slot = 0;
    each_attention_item(shape, visible, thread, num_threads,
                        [&](int64_t b, int64_t head, int64_t begin, int64_t end, int64_t blocks) {
                            if (begin > 0) slot = 1;
                            if (begin == 0 && end < blocks) last_b = b, last_head = head;
                        });
    if (last_b < 0) return;
    AttentionPart part(scratch + thread * thread_size + slot * part_size, rows, DV);
    for (int other = thread + 1; other < num_threads; ++other) {
        bool has = false;
        each_attention_item(shape, visible, other, num_threads,
                            [&](int64_t b, int64_t head, int64_t, int64_t, int64_t) {
                                has |= b == last_b && head == last_head;
                            });
        if (!has) continue;  // with few blocks a thread in between may have nothing
        AttentionPart more(scratch + other * thread_size, rows, DV);
        for (int64_t r = 0; r < rows; ++r) {
            float highest = more.peak[r] > part.peak[r] ? more.peak[r] : part.peak[r];
            float shift = highest == -INFINITY ? 0.0f : highest;
            float a = exp_(part.peak[r] - shift), b = exp_(more.peak[r] - shift);
            for (int c = 0; c < DV; ++c)
                part.sums[r * DV + c] = part.sums[r * DV + c] * a + more.sums[r * DV + c] * b;
            part.total[r] = part.total[r] * a + more.total[r] * b;
            part.peak[r] = highest;
        }
    }
    finish_attention<DV>(shape, last_b, last_head, part, sinks, out);
}

}  // namespace rw
