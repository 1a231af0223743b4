// Keys that were cached before their rotation, turned as they are read.
#pragma once
#include "attention_entries.h"
#include "rotary_append.h"

namespace rw {

// The first `width` numbers of the key of entry j turn by row j of the tables. scratch: num_threads * KV_BLOCK * D floats.
template <int D, typename From> struct RotatedEntries {
    using Key = float;
    using Value = typename From::Value;
    From from;
    const float *cos, *sin;  // [batch, entries, width / 2], strides below
    int64_t table_batch, table_head, table_entry, width;
    bool interleaved;
    float* scratch;

    void rows(int64_t batch, int64_t head, int64_t first, int count, int thread, const float** keys,
              const Value** values) const {
        const typename From::Key* plain[KV_BLOCK];
        from.rows(batch, head, first, count, thread, plain, values);
        float* turned = scratch + int64_t(thread) * KV_BLOCK * D;
        for (int i = 0; i < count; ++i, turned += D) {
            int64_t at = batch * table_batch + head * table_head + (first + i) * table_entry;
            rotate(plain[i], cos + at, sin + at, D, width, interleaved, turned);
            keys[i] = turned;
        }
    }
};

}  // namespace rw
