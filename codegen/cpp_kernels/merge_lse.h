// Attention over disjoint sets of entries joined by their log-sum-exps.
//
//     out = sum_p e^(lse_p - lse) out_p,   lse = log sum_p e^lse_p
//
// Source: https://arxiv.org/abs/2402.05099
#pragma once
#include "functions.h"

namespace rw {

// Parts are part_stride (and lse_stride) apart, their rows of `width` numbers contiguous. A part that saw
// nothing (lse = -inf) is not read. One thread joins whole rows. scratch: num_threads * num_parts floats.
template <typename Part, typename To>
inline void merge_lse(
    const Part* parts, int64_t part_stride, const float* lse, int64_t lse_stride, int64_t num_parts,
    int64_t rows, int64_t width, To* out, float* out_lse, float* scratch, int thread, int num_threads) {
    float* weights = scratch + thread * num_parts;
    Range mine = share(rows, thread, num_threads);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
        float highest = -INFINITY, total = 0;
        for (int64_t p = 0; p < num_parts; ++p) {
            float part = lse[p * lse_stride + r];
            highest = part > highest ? part : highest;
        }
        float shift = highest == -INFINITY ? 0.0f : highest;
        for (int64_t p = 0; p < num_parts; ++p) total += weights[p] = exp_(lse[p * lse_stride + r] - shift);
        float scale = total == 0 ? 0.0f : 1.0f / total;
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) {
            Vec sum = {};
            for (int64_t p = 0; p < num_parts; ++p)
                if (weights[p] != 0) sum += splat(weights[p]) * load(parts + p * part_stride + r * width + c);
            store(out + r * width + c, sum * splat(scale));
        }
        for (; c < width; ++c) {
            float sum = 0;
            for (int64_t p = 0; p < num_parts; ++p)
                if (weights[p] != 0) sum += weights[p] * to_float(parts[p * part_stride + r * width + c]);
            out[r * width + c] = from_float<To>(sum * scale);
        }
        out_lse[r] = total == 0 ? -INFINITY : shift + std::log(total);
    }
}

}  // namespace rw
