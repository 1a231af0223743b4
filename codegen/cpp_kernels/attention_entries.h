// Where the entries of a cache are, as pointers to rows: contiguous, paged, or chosen by an index.
//
// `rows(batch, kv_head, first, count, thread, keys, values)` of each gives `count` <= KV_BLOCK pointers to
// key and value rows from entry `first` on. head_dim is contiguous; strides are in elements.
#pragma once
#include "vec.h"

namespace rw {

// One entry after the other.
template <typename T> struct StridedEntries {
    using Key = T;
    using Value = T;
    const T *k, *v;
    int64_t k_batch, k_head, k_entry, v_batch, v_head, v_entry;

    void rows(int64_t batch, int64_t head, int64_t first, int count, int, const T** keys,
              const T** values) const {
        const T* key = k + batch * k_batch + head * k_head + first * k_entry;
        const T* value = v + batch * v_batch + head * v_head + first * v_entry;
        for (int i = 0; i < count; ++i) keys[i] = key + i * k_entry, values[i] = value + i * v_entry;
    }
};

// In pages: entry j is row j % page_size of page table[batch * table_batch + j / page_size].
template <typename T> struct PagedEntries {
    using Key = T;
    using Value = T;
    const T *k, *v;
    int64_t k_page, k_head, k_entry, v_page, v_head, v_entry;
    const int64_t* table;
    int64_t table_batch, page_size;

    void rows(int64_t batch, int64_t head, int64_t first, int count, int, const T** keys,
              const T** values) const {
        const int64_t* pages = table + batch * table_batch;
        int64_t page = first / page_size, row = first % page_size;
        for (int i = 0; i < count; ++i) {
            keys[i] = k + pages[page] * k_page + head * k_head + row * k_entry;
            values[i] = v + pages[page] * v_page + head * v_head + row * v_entry;
            if (++row == page_size) row = 0, ++page;
        }
    }
};

// Chosen ones: entry j is entry index[batch * index_batch + head * index_head + j] of `from`.
template <typename From> struct GatheredEntries {
    using Key = typename From::Key;
    using Value = typename From::Value;
    From from;
    const int64_t* index;
    int64_t index_batch, index_head;

    void rows(int64_t batch, int64_t head, int64_t first, int count, int thread, const Key** keys,
              const Value** values) const {
        const int64_t* chosen = index + batch * index_batch + head * index_head + first;
        for (int i = 0; i < count; ++i) from.rows(batch, head, chosen[i], 1, thread, keys + i, values + i);
    }
};

}  // namespace rw
