// Vectors of floats as wide as the machine's registers, loaded from fp32, bf16 or int8.
//
// The compiler's own vector types stand for all instruction sets: AVX-512, AVX2, NEON, scalar. A multiply
// and an add become one fused instruction where there is one (-ffp-contract=fast).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace rw {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#elif defined(__ARM_NEON)
constexpr int LANES = 4;
#else
constexpr int LANES = 1;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t VecU32 __attribute__((vector_size(4 * LANES)));
typedef int32_t VecI32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * LANES)));
typedef int8_t VecI8 __attribute__((vector_size(1 * LANES)));

// A bfloat16 as it lies in memory.
struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return float(x); }
inline float to_float(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
}

// Rounds to nearest, ties to even, as PyTorch does; NaN stays NaN.
inline bf16 round_bf16(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    if ((wide & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((wide >> 16) | 0x40)};
    return bf16{uint16_t((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16)};
}

// A half-precision number as it lies in memory, for operands of epilogues: converted one by one.
struct f16 {
    uint16_t bits;
};

inline float to_float(f16 x) {
    uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, size = x.bits & 0x7fffu;
    // The exponent moves by 112; below the normal ones and above them it is scaled and set.
    uint32_t wide = size >= 0x7c00u ? (size << 13) | 0x7f800000u : (size << 13) + (112u << 23);
    float result;
    if (size < 0x0400u) {
        result = float(size) * 5.9604644775390625e-8f;  // 2^-24
        std::memcpy(&wide, &result, 4);
    }
    wide |= sign;
    std::memcpy(&result, &wide, 4);
    return result;
}

// Rounds to nearest, ties to even, as PyTorch does; NaN stays NaN, what is too large becomes infinite.
inline f16 round_f16(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    uint16_t sign = uint16_t((wide >> 16) & 0x8000u);
    wide &= 0x7fffffffu;
    if (wide > 0x7f800000u) return f16{uint16_t(sign | 0x7e00u)};
    if (wide >= 0x477ff000u) return f16{uint16_t(sign | 0x7c00u)};  // from 65520 on
    if (wide < 0x38800000u) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24, rounded
        float size;
        std::memcpy(&size, &wide, 4);
        size += 0.5f;
        std::memcpy(&wide, &size, 4);
        return f16{uint16_t(sign | (wide - 0x3f000000u))};
    }
    wide += 0xfffu + ((wide >> 13) & 1u);
    return f16{uint16_t(sign | ((wide - (112u << 23)) >> 13))};
}

template <typename T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) { return round_bf16(x); }

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline Vec load(const bf16* p) {
    VecU16 narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return (Vec)(__builtin_convertvector(narrow, VecU32) << 16);
}
inline Vec load(const int8_t* p) {
    VecI8 narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(__builtin_convertvector(narrow, VecI32), Vec);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Vec v) {
    for (int i = 0; i < LANES; ++i) p[i] = round_bf16(v[i]);
}

inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}
inline float largest(Vec v) {
    float result = v[0];
    for (int i = 1; i < LANES; ++i) result = v[i] > result ? v[i] : result;
    return result;
}

// Part `thread` of `num_threads` of 0 .. count, in whole blocks.
struct Range {
    int64_t begin, end;
};
inline Range share(int64_t count, int thread, int num_threads, int64_t block = 1) {
    int64_t blocks = (count + block - 1) / block;
    int64_t begin = blocks * thread / num_threads * block;
    int64_t end = blocks * (thread + 1) / num_threads * block;
    return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace rw
