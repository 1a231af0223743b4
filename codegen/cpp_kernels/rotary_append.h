// Rotary position embedding of new queries and keys, and the keys' and values' way into the cache.
//
//     (a, b) -> (a cos - b sin, b cos + a sin),  pairs (x[i], x[i + width / 2]) or (x[2i], x[2i + 1])
//
// In fp32; cos and sin are fp32 [.., width / 2]. What is behind `width` stays as it is.
// Source: https://arxiv.org/abs/2104.09864
#pragma once
#include "vec.h"

namespace rw {

// One row of `dim` numbers; `out` may be `x`.
template <typename From, typename To>
inline void rotate(
    const From* x, const float* cos, const float* sin, int64_t dim, int64_t width, bool interleaved, To* out) {
    int64_t half = width / 2, i = 0;
    if (interleaved) {
        for (; i < half; ++i) {
            float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
            out[2 * i] = from_float<To>(a * cos[i] - b * sin[i]);
            out[2 * i + 1] = from_float<To>(b * cos[i] + a * sin[i]);
        }
    } else {
        for (; i + LANES <= half; i += LANES) {
            Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
            store(out + i, a * c - b * s);
            store(out + half + i, b * c + a * s);
        }
        for (; i < half; ++i) {
            float a = to_float(x[i]), b = to_float(x[half + i]);
            out[i] = from_float<To>(a * cos[i] - b * sin[i]);
            out[half + i] = from_float<To>(b * cos[i] + a * sin[i]);
        }
    }
    for (i = width; i < dim; ++i) out[i] = from_float<To>(to_float(x[i]));
}

// Rows [batch, heads, q_len, dim] of new tokens; strides in elements, dim contiguous.
template <typename T> struct NewRows {
    T* data;
    int64_t batch, head, row;
    T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};
// A cache [batch, kv_heads, entries, dim].
template <typename T> struct CacheRows {
    T* data;
    int64_t batch, head, entry;
    T* at(int64_t b, int64_t h, int64_t j) const { return data + b * batch + h * head + j * entry; }
};

struct RotaryShape {
    int64_t batch_size, num_heads, num_kv_heads, q_len, head_dim, value_dim, width;
    bool interleaved;
    int64_t table_batch, table_row;  // strides of cos and sin over batch and new tokens
};

// One phase. Queries are turned into q_out (may be q); keys are turned into entry slot(batch, i) of k_cache,
// values copied to that of v_cache. width 0 rotates nothing. Rows of one token and head go to one thread.
template <typename T, typename Cache, typename Slot>
inline void rotary_append(
    const RotaryShape& shape, NewRows<const T> q, NewRows<const T> k, NewRows<const T> v, const float* cos,
    const float* sin, NewRows<T> q_out, CacheRows<Cache> k_cache, CacheRows<Cache> v_cache,
    const Slot& slot, int thread, int num_threads) {
    int64_t heads = shape.num_heads + 2 * shape.num_kv_heads;
    Range mine = share(shape.batch_size * shape.q_len * heads, thread, num_threads);
    for (int64_t at = mine.begin; at < mine.end; ++at) {
        int64_t head = at % heads, i = at / heads % shape.q_len, b = at / heads / shape.q_len;
        int64_t table = b * shape.table_batch + i * shape.table_row;
        int64_t kv_head = (head - shape.num_heads) / 2;
        if (head < shape.num_heads) {
            rotate(q.at(b, head, i), cos + table, sin + table, shape.head_dim, shape.width,
                   shape.interleaved, q_out.at(b, head, i));
        } else if ((head - shape.num_heads) % 2 == 0) {
            rotate(k.at(b, kv_head, i), cos + table, sin + table, shape.head_dim, shape.width,
                   shape.interleaved, k_cache.at(b, kv_head, slot(b, i)));
        } else {
            const T* from = v.at(b, kv_head, i);
            Cache* to = v_cache.at(b, kv_head, slot(b, i));
            for (int64_t c = 0; c < shape.value_dim; ++c) to[c] = from_float<Cache>(to_float(from[c]));
        }
    }
}

}  // namespace rw
