// Scalar functions of one float, free of branches, so that loops over them become vector code.
#pragma once
#include "vec.h"

namespace rw {

// e^x by 2^n times a polynomial of degree 6; relative error below 2e-7. -inf gives 0, NaN stays NaN. Always
// inlined, as it is called from the innermost loops and compilers find it too long to do so.
__attribute__((always_inline)) inline float exp_(float x) {
    float bounded = x < -87.336544f ? -87.336544f : x;
    bounded = bounded > 88.722839f ? 88.722839f : bounded;
    float n = std::nearbyint(bounded * 1.44269504088896341f);
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // Two halves of the exponent, so that 2^128 and 2^-127 do not leave the range on the way.
    int32_t whole = int32_t(n), half = whole >> 1;
    uint32_t low = uint32_t(half + 127) << 23, high = uint32_t(whole - half + 127) << 23;
    float a, b;
    std::memcpy(&a, &low, 4);
    std::memcpy(&b, &high, 4);
    float result = p * a * b;
    result = x < -87.336544f ? 0.0f : result;
    result = x > 88.722839f ? INFINITY : result;
    return x != x ? x : result;
}

// The same of a whole vector, as compilers do not vectorise the scalar one where its bits are moved.
inline Vec exp_(Vec x) {
    const Vec least = splat(-87.336544f), most = splat(88.722839f), round = splat(12582912.0f);  // 1.5 * 2^23
    Vec bounded = x < least ? least : x;
    bounded = bounded > most ? most : bounded;
    Vec n = (bounded * splat(1.44269504088896341f) + round) - round;
    Vec r = bounded - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
    Vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    VecI32 whole = __builtin_convertvector(n, VecI32), half = whole >> 1;
    Vec result = p * (Vec)((half + 127) << 23) * (Vec)((whole - half + 127) << 23);
    result = x < least ? Vec{} : result;
    result = x > most ? splat(INFINITY) : result;
    return x != x ? x : result;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }
inline float silu(float x) { return x / (1.0f + exp_(-x)); }

// Through e^-2|x|; near zero by its series, where that would cancel.
inline float tanh_(float x) {
    float a = x < 0 ? -x : x, e = exp_(-2.0f * a), y = x * x;
    float large = (1.0f - e) / (1.0f + e);
    float small = a + a * y * (-0.333333333f + y * (0.133333333f + y * (-0.053968254f)));
    float result = a < 0.15f ? small : large;
    return x < 0 ? -result : result;
}

// The angle's quarter turns are taken off in double precision, so that large positions stay exact.
inline float quarter_sine(float x, int turns) {
    double angle = x, n = std::nearbyint(angle * 0.63661977236758134);
    float r = float(angle - n * 1.5707963267948966 - n * 6.123233995736766e-17), y = r * r;
    int quarter = (int(n) + turns) & 3;
    float sine = r + r * y * (-1.6666654611e-1f + y * (8.3321608736e-3f - y * 1.9515295891e-4f));
    float cosine = 1.0f - 0.5f * y
        + y * y * (4.166664568298827e-2f + y * (-1.388731625493765e-3f + y * 2.443315711809948e-5f));
    float result = quarter & 1 ? cosine : sine;
    return quarter & 2 ? -result : result;
}
inline float sin_(float x) { return quarter_sine(x, 0); }
inline float cos_(float x) { return quarter_sine(x, 1); }

// Abramowitz and Stegun 7.1.26 is too coarse; the C library's is exact and used rarely.
inline float erf_(float x) { return std::erf(x); }
inline float gelu(float x) { return 0.5f * x * (1.0f + erf_(x * 0.70710678118654752f)); }
inline float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanh_(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
inline float quick_gelu(float x) { return x * sigmoid(1.702f * x); }
inline float relu(float x) { return x > 0 ? x : (x != x ? x : 0.0f); }

}  // namespace rw
