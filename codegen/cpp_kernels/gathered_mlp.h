// A gated feed-forward block over some of its neurons: only their rows of gate, up and down are read.
//
// A neuron's three rows are contiguous when down is stored transposed, [intermediate_size, hidden_size].
// A thread takes its share of the chosen neurons all the way: gate and up, then down into a sum of its own.
// So nobody waits in between, and the sums of all threads are added in a last phase.
#pragma once
#include "gemv.h"

namespace rw {

// y += sum over r of factors[r] * rows[r]; asks for the beginnings of `next` towards the end.
template <int R, typename W>
inline void add_rows(const W* const (&rows)[R], const W* const (&next)[R], const float* factors,
                     float* y, int64_t columns) {
    Vec factor[R];
    for (int r = 0; r < R; ++r) factor[r] = splat(factors[r]);
    int64_t rest = read_side_by_side(rows, next, columns, [&](int64_t c) {
        Vec total = load(y + c);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) total += factor[r] * load_weights(rows[r] + c);
        store(y + c, total);
    });
    for (int64_t c = rest; c < columns; ++c)
        for (int r = 0; r < R; ++r) y[c] += factors[r] * to_float(rows[r][c]);
}

// y += sum of factors[i] * row_at(i) over i of begin .. end.
template <int R, typename RowAt>
inline void sweep_add(int64_t begin, int64_t end, RowAt&& row_at, const float* factors, float* y,
                      int64_t columns) {
    int64_t i = begin;
    for (; i + R <= end; i += R) {
        decltype(row_at(i)) rows[R], next[R];
        for (int r = 0; r < R; ++r) {
            rows[r] = row_at(i + r);
            next[r] = row_at(i + R + r < end ? i + R + r : end - 1);
        }
        add_rows<R>(rows, next, factors + i, y, columns);
    }
    if constexpr (R > 1) sweep_add<R / 2>(i, end, row_at, factors, y, columns);
}

// The matrices of a block: gate and up [intermediate_size, in_size], down [intermediate_size, out_size].
template <typename W> struct GatedWeights {
    const W *gate, *up, *down;
    int64_t gate_stride, up_stride, down_stride, in_size, out_size;
};

template <typename W, typename Index>
inline void add_down(const GatedWeights<W>& w, const Index* list, const float* active, float* partial,
                     Range mine) {
    for (int64_t c = 0; c < w.out_size; ++c) partial[c] = 0;
    auto row_at = [&](int64_t p) { return w.down + int64_t(list[p]) * w.down_stride; };
    sweep_add<8>(mine.begin, mine.end, row_at, active, partial, w.out_size);
}

// The neurons in `list`: partial[thread] = sum of neuron(index, gate . x, up . x) * down[index].
// Scratch: active [count], partial [num_threads, out_size].
template <typename W, typename Index, typename Neuron>
inline void gathered_neurons(const GatedWeights<W>& w, const float* x, const Index* list, int64_t count,
                             Neuron&& neuron, float* active, float* partial, int thread,
                             int num_threads) {
    Range mine = share(count, thread, num_threads);
    auto row_at = [&](int64_t i) {
        int64_t index = list[i >> 1];
        return i & 1 ? w.up + index * w.up_stride : w.gate + index * w.gate_stride;
    };
    float gate = 0;
    auto emit = [&](int64_t i, int, float value) {
        if (i & 1)
            active[i >> 1] = neuron(int64_t(list[i >> 1]), gate, value);
        else
            gate = value;
    };
    sweep_rows<rows_per_block(1), 1>(2 * mine.begin, 2 * mine.end, row_at, x, 0, w.in_size, emit);
    add_down(w, list, active, partial + thread * w.out_size, mine);
}

// Which entries of a vector are kept: those whose magnitude has more than `limit` for its bits, and the
// first `ties` that have as much. A NaN is larger than everything, so it is kept and seen.
struct Kept {
    int32_t limit;
    int64_t ties, count;
};

inline int32_t magnitude_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return int32_t(bits & 0x7fffffffu);
}

// Magnitudes above a threshold.
inline Kept keep_above(const float* values, int64_t size, float threshold) {
    int32_t limit = threshold < 0 ? -1 : magnitude_bits(threshold);
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) count += magnitude_bits(values[i]) > limit;
    return {limit, 0, count};
}

// The `count` largest magnitudes, of equal ones the first: digit by digit, from the top.
inline Kept keep_largest(const float* values, int64_t size, int64_t count) {
    if (count >= size) return {-1, 0, size};
    if (count <= 0) return {INT32_MAX, 0, 0};
    int32_t known = 0, prefix = 0;  // bits that all candidates for the limit share
    int64_t wanted = count;
    for (int shift = 20; shift >= 0; shift -= 10) {
        int64_t seen[2048] = {};
        int digit = shift == 20 ? 2047 : 1023;
        for (int64_t i = 0; i < size; ++i) {
            int32_t bits = magnitude_bits(values[i]);
            seen[bits >> shift & digit] += (bits & known) == prefix;
        }
        int at = digit;
        for (; seen[at] < wanted; --at) wanted -= seen[at];
        prefix |= at << shift;
        known |= digit << shift;
    }
    return {prefix, wanted, count};
}

// list[0 .. kept.count) = the kept indices, rising; has room for `size`.
inline void list_kept(const float* values, int64_t size, Kept kept, int32_t* list) {
    int64_t at = 0, ties = kept.ties;
    for (int64_t i = 0; i < size; ++i) {
        int32_t bits = magnitude_bits(values[i]);
        bool tie = bits == kept.limit && ties > 0;
        list[at] = int32_t(i);
        at += bits > kept.limit || tie;
        ties -= tie;
    }
}

// The kept neurons of a dense gate that was activated: partial[thread] = sum of
// neuron(index, gated[index], up . x) * down[index]. Every thread makes the whole list for itself, which is
// sooner done than waiting for the others. Scratch: lists [num_threads, intermediate_size],
// active [intermediate_size], partial [num_threads, out_size].
template <typename W, typename Neuron>
inline void kept_neurons(const GatedWeights<W>& w, const float* x, const float* gated,
                         int64_t intermediate_size, Kept kept, Neuron&& neuron, int32_t* lists,
                         float* active, float* partial, int thread, int num_threads) {
    int32_t* list = lists + thread * intermediate_size;
    list_kept(gated, intermediate_size, kept, list);
    Range mine = share(kept.count, thread, num_threads);
    auto row_at = [&](int64_t p) { return w.up + int64_t(list[p]) * w.up_stride; };
    auto emit = [&](int64_t p, int, float up) {
        active[p] = neuron(int64_t(list[p]), gated[list[p]], up);
    };
    sweep_rows<rows_per_block(1), 1>(mine.begin, mine.end, row_at, x, 0, w.in_size, emit);
    add_down(w, list, active, partial + thread * w.out_size, mine);
}

// out(column, sum of the threads' sums); after a barrier.
template <typename Out>
inline void add_partials(const float* partial, int64_t out_size, Out&& out, int thread,
                         int num_threads) {
    Range mine = share(out_size, thread, num_threads, LANES);
    for (int64_t c = mine.begin; c < mine.end; ++c) {
        float total = partial[c];
        for (int t = 1; t < num_threads; ++t) total += partial[t * out_size + c];
        out(c, total);
    }
}

}  // namespace rw
