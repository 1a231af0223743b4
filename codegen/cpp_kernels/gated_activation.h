// act(gate) * up, elementwise.
//
// In fp32. Sources: https://arxiv.org/abs/2002.05202 (GLU variants)
#pragma once
#include "functions.h"

namespace rw {

// gate and up: rows of `width` numbers, their strides apart, so that both may be halves of one row. `act` is
// a functor float -> float without branches, e.g. [](float x) { return silu(x); }. out is contiguous and may
// be gate or up where those are contiguous. Threads share numbers, not rows: one row is enough for all.
template <typename T, typename To, typename Act>
inline void gated_activation(
    const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t rows, int64_t width, To* out,
    const Act& act, int thread, int num_threads) {
    Range mine = share(rows * width, thread, num_threads, 16);
    for (int64_t at = mine.begin; at < mine.end;) {
        int64_t row = at / width, column = at % width;
        int64_t count = width - column < mine.end - at ? width - column : mine.end - at;
        const T *g = gate + row * gate_stride + column, *u = up + row * up_stride + column;
        To* to = out + at;
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) to[i] = from_float<To>(act(to_float(g[i])) * to_float(u[i]));
        at += count;
    }
}

}  // namespace rw
