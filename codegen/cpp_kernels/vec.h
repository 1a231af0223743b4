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
