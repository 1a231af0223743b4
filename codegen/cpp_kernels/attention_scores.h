// What becomes of attention's scores between the two products: softcap, bias, ALiBi, masks; and which
// entries a query may see at all.
#pragma once
#include "attention_tile.h"

namespace rw {

struct AttentionShape {
    int64_t batch_size, num_kv_heads, group_size, q_len;
    int64_t rows() const { return group_size * q_len; }
};

// Entries that some query of a batch row may see: two ranges [first, last), the second after the first;
// either may be empty.
struct Spans {
    int64_t first[2], last[2];
    int64_t blocks(int range) const {
        int64_t entries = last[range] - first[range];
        return entries > 0 ? (entries + KV_BLOCK - 1) / KV_BLOCK : 0;
    }
    int64_t blocks() const {  // at least one, so that somebody writes the zeros of who sees nothing
        int64_t all = blocks(0) + blocks(1);
        return all > 0 ? all : 1;
    }
};
inline Spans entries_between(int64_t first, int64_t last) { return {{first, 0}, {last, 0}}; }

// Called as score(batch, kv_head, row of the group, first, count, s): s[e] is q . k * scale of entry first + e.

struct PlainScores {
    void operator()(int64_t, int64_t, int64_t, int64_t, int, float*) const {}
};

enum class Mask { FULL, CAUSAL, SLIDING_WINDOW, CHUNKED, PREFIX, LOCAL, SINKS_WINDOW };

// Everything that may happen to a score, chosen at run time; constants fold away. In this order: softcap,
// bias, ALiBi, mask. Null pointers leave a part out; a stride of 0 broadcasts. Strides in elements.
struct Scores {
    int64_t group_size, q_len, kv_len;
    Mask mask = Mask::FULL;
    int64_t span = 0, num_sink_tokens = 0;
    float softcap = 0;
    const int64_t* q_positions = nullptr;  // else the last q_len of kv_len; -1 sees nothing
    const int64_t* k_positions = nullptr;  // else the entry's number; -1 is not seen
    int64_t q_batch = 0, k_batch = 0, k_head = 0;
    const int64_t* distance = nullptr;  // i - j where positions do not tell it, [batch, q_len, kv_len];
                                        // not for masks that ask where i or j is
    int64_t distance_batch = 0, distance_row = 0;
    const float* bias = nullptr;  // [batch, heads, q_len, kv_len]
    int64_t bias_batch = 0, bias_head = 0, bias_row = 0, bias_entry = 0;
    const bool* seen = nullptr;  // the same shape, true = visible
    int64_t seen_batch = 0, seen_head = 0, seen_row = 0, seen_entry = 0;
    const float* slopes = nullptr;  // [heads]

    void operator()(int64_t batch, int64_t kv_head, int64_t row, int64_t first, int count, float* s) const {
        int64_t head = kv_head * group_size + row / q_len, query = row % q_len;
        if (softcap != 0)
            for (int e = 0; e < count; ++e) s[e] = softcap * tanh_(s[e] / softcap);
        if (bias) {
            const float* b = bias + batch * bias_batch + head * bias_head + query * bias_row;
            for (int e = 0; e < count; ++e) s[e] += b[(first + e) * bias_entry];
        }
        if (seen) {
            const bool* b = seen + batch * seen_batch + head * seen_head + query * seen_row;
            for (int e = 0; e < count; ++e) s[e] = b[(first + e) * seen_entry] ? s[e] : -INFINITY;
        }
        if (!slopes && mask == Mask::FULL && !q_positions && !k_positions) return;
        int64_t i = distance ? FAR : q_positions ? q_positions[batch * q_batch + query] : kv_len - q_len + query;
        int64_t entries[KV_BLOCK];
        if (distance) {
            const int64_t* far = distance + batch * distance_batch + query * distance_row + first;
            for (int e = 0; e < count; ++e) entries[e] = i - far[e];
        } else if (k_positions) {
            const int64_t* at = k_positions + batch * k_batch + kv_head * k_head + first;
            for (int e = 0; e < count; ++e) entries[e] = at[e];
        } else {
            for (int e = 0; e < count; ++e) entries[e] = first + e;
        }
        if (slopes)
            for (int e = 0; e < count; ++e) s[e] += slopes[head] * float(entries[e] - i);
        hide(i, entries, count, s);
    }

  private:
    static constexpr int64_t FAR = int64_t(1) << 40;
    template <typename Rule> static void apply(const int64_t* j, int count, float* s, Rule visible) {
        for (int e = 0; e < count; ++e) s[e] = (visible(j[e]) && j[e] >= 0) ? s[e] : -INFINITY;
    }
    void hide(int64_t i, const int64_t* entries, int count, float* s) const {
        int64_t w = span > 0 ? span : 1, n = span, sinks = num_sink_tokens;
        if (i < 0) return apply(entries, count, s, [](int64_t) { return false; });
        switch (mask) {
            case Mask::FULL: return apply(entries, count, s, [](int64_t) { return true; });
            case Mask::CAUSAL: return apply(entries, count, s, [=](int64_t j) { return j <= i; });
            case Mask::SLIDING_WINDOW:
                return apply(entries, count, s, [=](int64_t j) { return j <= i && i - j < w; });
            case Mask::CHUNKED:
                return apply(entries, count, s, [=](int64_t j) { return j <= i && j >= i / w * w; });
            case Mask::PREFIX:
                return apply(entries, count, s, [=](int64_t j) { return j <= i || j < n; });
            case Mask::LOCAL:
                return apply(entries, count, s, [=](int64_t j) { return j - i <= n && i - j <= n; });
            case Mask::SINKS_WINDOW:
                return apply(entries, count, s,
                             [=](int64_t j) { return j <= i && (i - j < w || j < sinks); });
        }
    }
};

// What the last q_len of kv_len entries at positions 0, 1, .. may see: nothing else need be read.
inline Spans visible_spans(Mask mask, int64_t span, int64_t num_sink_tokens, int64_t q_len, int64_t kv_len) {
    int64_t query = kv_len > q_len ? kv_len - q_len : 0, w = span > 0 ? span : 1, start = 0;
    if (mask == Mask::SLIDING_WINDOW || mask == Mask::SINKS_WINDOW) start = query - w + 1;
    if (mask == Mask::CHUNKED) start = query / w * w;
    if (mask == Mask::LOCAL) start = query - span;
    if (start < 0) start = 0;
    if (mask != Mask::SINKS_WINDOW) return entries_between(start, kv_len);
    int64_t sinks = num_sink_tokens < start ? num_sink_tokens : start;
    return {{0, start}, {sinks, kv_len}};
}

}  // namespace rw
