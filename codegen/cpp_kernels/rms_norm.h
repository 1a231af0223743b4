// RMSNorm and LayerNorm of rows, with the residual sum in front of them.
//
//     h = x + residual,  rms: h / sqrt(mean(h^2) + eps) * (offset + weight),
//     layer: (h - mean(h)) / sqrt(mean((h - mean)^2) + eps) * (offset + weight) + bias
//
// In fp32, like the models' own. Sources: https://arxiv.org/abs/1910.07467, https://arxiv.org/abs/1607.06450
#pragma once
#include "vec.h"

namespace rw {

// Sum of f(i, vector) over whole vectors and g(i) over the rest of [begin, end), in four chains.
template <typename F, typename G> inline float sum_over(int64_t begin, int64_t end, F&& f, G&& g) {
    Vec part[4] = {};
    int64_t i = begin;
    for (; i + 4 * LANES <= end; i += 4 * LANES)
        for (int k = 0; k < 4; ++k) part[k] += f(i + k * LANES);
    for (; i + LANES <= end; i += LANES) part[0] += f(i);
    float total = sum((part[0] + part[1]) + (part[2] + part[3]));
    for (; i < end; ++i) total += g(i);
    return total;
}

// sum[i] = x[i] + residual[i], and returns the sum of its squares over [begin, end): the part of a norm that
// threads can share. `sum` may be x or residual.
template <typename T>
inline float add_and_square(const T* x, const T* residual, T* sum, int64_t begin, int64_t end) {
    return sum_over(
        begin, end,
        [&](int64_t i) {
            store(sum + i, load(x + i) + load(residual + i));
            Vec h = load(sum + i);
            return h * h;
        },
        [&](int64_t i) {
            sum[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
            return to_float(sum[i]) * to_float(sum[i]);
        });
}
template <typename T> inline float sum_of_squares(const T* x, int64_t begin, int64_t end) {
    return sum_over(
        begin, end, [&](int64_t i) { return load(x + i) * load(x + i); },
        [&](int64_t i) { return to_float(x[i]) * to_float(x[i]); });
}

// out[i] = (x[i] - mean) * scale * (offset + weight[i]) + bias[i] over [begin, end); null weight is
// 1 - offset, null bias is 0. `out` may be x.
template <typename T, typename W, typename To>
inline void apply_norm(
    const T* x, float mean, float scale, const W* weight, float offset, const W* bias, To* out, int64_t begin,
    int64_t end) {
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) {
        Vec y = (load(x + i) - splat(mean)) * splat(scale);
        if (weight) y = y * (load(weight + i) + splat(offset));
        if (bias) y = y + load(bias + i);
        store(out + i, y);
    }
    for (; i < end; ++i) {
        float y = (to_float(x[i]) - mean) * scale;
        if (weight) y = y * (to_float(weight[i]) + offset);
        if (bias) y = y + to_float(bias[i]);
        out[i] = from_float<To>(y);
    }
}

// Rows of `width` numbers, row_stride apart; each row is one thread's. With a residual (same strides), `sum`
// gets x + residual in T, from which the norm is taken; `sum` may be x or residual. `out` is contiguous.
template <typename T, typename W, typename To>
inline void rms_norm(
    const T* x, const T* residual, T* sum, int64_t rows, int64_t width, int64_t row_stride, const W* weight,
    float offset, float eps, To* out, int thread, int num_threads) {
    Range mine = share(rows, thread, num_threads);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
        const T* row = x + r * row_stride;
        float squares;
        if (residual) {
            T* to = sum + r * row_stride;
            squares = add_and_square(row, residual + r * row_stride, to, 0, width);
            row = to;
        } else {
            squares = sum_of_squares(row, 0, width);
        }
        float scale = 1.0f / std::sqrt(squares / float(width) + eps);
        apply_norm(row, 0.0f, scale, weight, offset, (const W*)nullptr, out + r * width, 0, width);
    }
}

// The same with the mean taken out and a bias added. Two passes, as the variance from a sum of squares
// cancels where the mean is large.
template <typename T, typename W, typename To>
inline void layer_norm(
    const T* x, const T* residual, T* sum, int64_t rows, int64_t width, int64_t row_stride, const W* weight,
    float offset, const W* bias, float eps, To* out, int thread, int num_threads) {
    Range mine = share(rows, thread, num_threads);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
        const T* row = x + r * row_stride;
        if (residual) {
            T* to = sum + r * row_stride;
            add_and_square(row, residual + r * row_stride, to, 0, width);
            row = to;
        }
        float mean = sum_over(
            0, width, [&](int64_t i) { return load(row + i); }, [&](int64_t i) { return to_float(row[i]); });
        mean /= float(width);
        float squares = sum_over(
            0, width,
            [&](int64_t i) {
                Vec far = load(row + i) - splat(mean);
                return far * far;
            },
            [&](int64_t i) { return (to_float(row[i]) - mean) * (to_float(row[i]) - mean); });
        float scale = 1.0f / std::sqrt(squares / float(width) + eps);
        apply_norm(row, mean, scale, weight, offset, bias, out + r * width, 0, width);
    }
}

}  // namespace rw
