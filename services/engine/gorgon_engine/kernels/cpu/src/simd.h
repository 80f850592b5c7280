// Sixteen fp32 lanes with one meaning on every instruction set, so that each kernel is written once.
//
// Compiled with -ffp-contract=off and without -ffast-math: a multiply-add is fused exactly where fma() is written, and
// no sum is reordered. That is what lets a row's bits be independent of the tile it was computed in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(GORGON_FORCE_GENERIC)
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define GORGON_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define GORGON_AVX2 1
#endif
#endif

#if defined(GORGON_AVX512) || defined(GORGON_AVX2)
#include <immintrin.h>
#endif

namespace gorgon {

constexpr int kLanes = 16;

inline float bf16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);  // a NaN stays a NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(GORGON_AVX512)

struct F16 {
  __m512 v;
};

inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1), p)};
}
inline void store_n(float* p, F16 a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1), a.v);
}
inline F16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline F16 round_even(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F16 scale_by_power_of_two(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline F16 zero_below(F16 x, float limit, F16 a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), a.v)};
}
inline F16 load_bf16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline __m256i to_bf16(F16 a) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
inline void store_bf16(uint16_t* p, F16 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
// Rounds to int8 range values already scaled to [-127, 127], stores them and returns the rounded lanes.
inline F16 store_int8(int8_t* p, F16 a) {
  const __m512i q = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(q));
  return {_mm512_cvtepi32_ps(q)};
}

#else  // AVX2 and the portable form share everything that is not worth an intrinsic

#if defined(GORGON_AVX2)

struct F16 {
  __m256 a, b;
};

inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 operator+(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 operator-(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 operator*(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 operator/(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 abs(F16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F16 round_even(F16 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F16 scale_by_power_of_two(F16 x, F16 n) {
  return {_mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b))};
}
inline F16 zero_below(F16 x, float limit, F16 y) {
  const __m256 bound = _mm256_set1_ps(limit);
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, bound, _CMP_NLT_UQ), y.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, bound, _CMP_NLT_UQ), y.b)};
}
inline __m256 widen_bf16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline F16 load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }

#else

struct F16 {
  float v[kLanes];
};

#define GORGON_EACH_LANE(expression)                        \
  F16 out;                                                  \
  for (int i = 0; i < kLanes; ++i) out.v[i] = (expression); \
  return out

inline F16 load(const float* p) { GORGON_EACH_LANE(p[i]); }
inline void store(float* p, F16 x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline F16 set1(float x) { GORGON_EACH_LANE(x); }
inline F16 operator+(F16 x, F16 y) { GORGON_EACH_LANE(x.v[i] + y.v[i]); }
inline F16 operator-(F16 x, F16 y) { GORGON_EACH_LANE(x.v[i] - y.v[i]); }
inline F16 operator*(F16 x, F16 y) { GORGON_EACH_LANE(x.v[i] * y.v[i]); }
inline F16 operator/(F16 x, F16 y) { GORGON_EACH_LANE(x.v[i] / y.v[i]); }
#if defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
inline F16 fma(F16 x, F16 y, F16 z) { GORGON_EACH_LANE(__builtin_fmaf(x.v[i], y.v[i], z.v[i])); }
#else  // without the instruction, fmaf() is a slow library call; two roundings are as repeatable as one
inline F16 fma(F16 x, F16 y, F16 z) { GORGON_EACH_LANE(x.v[i] * y.v[i] + z.v[i]); }
#endif
inline F16 max(F16 x, F16 y) { GORGON_EACH_LANE(x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
inline F16 min(F16 x, F16 y) { GORGON_EACH_LANE(x.v[i] < y.v[i] ? x.v[i] : y.v[i]); }
inline F16 abs(F16 x) { GORGON_EACH_LANE(std::fabs(x.v[i])); }
// Adding and taking away 1.5 * 2^23 rounds to the nearest even integer, and vectorises everywhere.
inline F16 round_even(F16 x) { GORGON_EACH_LANE((x.v[i] + 12582912.0f) - 12582912.0f); }
inline float power_of_two(float n) {
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline F16 scale_by_power_of_two(F16 x, F16 n) { GORGON_EACH_LANE(x.v[i] * power_of_two(n.v[i])); }
inline F16 zero_below(F16 x, float limit, F16 y) { GORGON_EACH_LANE(x.v[i] < limit ? 0.0f : y.v[i]); }
inline F16 load_bf16(const uint16_t* p) { GORGON_EACH_LANE(bf16_to_float(p[i])); }
#undef GORGON_EACH_LANE

#endif

inline F16 load_n(const float* p, int n) {
  float lanes[kLanes] = {};
  for (int i = 0; i < kLanes && i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline void store_n(float* p, F16 x, int n) {
  if (n >= kLanes) return store(p, x);
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
inline void store_bf16(uint16_t* p, F16 x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(lanes[i]);
}
inline F16 store_int8(int8_t* p, F16 x) {
  const F16 rounded = round_even(x);
  float lanes[kLanes];
  store(lanes, rounded);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(static_cast<int32_t>(lanes[i]));
  return rounded;
}

#endif

// Halves against halves, on every instruction set: lane i with lane i + 8, then i + 4, i + 2, i + 1.
#if defined(GORGON_AVX512) || defined(GORGON_AVX2)
#if defined(GORGON_AVX512)
inline __m256 low_half(F16 x) { return _mm512_castps512_ps256(x.v); }
inline __m256 high_half(F16 x) { return _mm512_extractf32x8_ps(x.v, 1); }
#else
inline __m256 low_half(F16 x) { return x.a; }
inline __m256 high_half(F16 x) { return x.b; }
#endif

inline float reduce_add(F16 x) {
  const __m256 eight = _mm256_add_ps(low_half(x), high_half(x));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float reduce_max(F16 x) {
  const __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float reduce_add(F16 x) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x.v[i] += x.v[i + width];
  return x.v[0];
}

inline float reduce_max(F16 x) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x.v[i] = x.v[i] > x.v[i + width] ? x.v[i] : x.v[i + width];
  return x.v[0];
}
#endif

// exp(x), relative error below 2e-7; exactly 1 at 0 and exactly 0 below -87 (the mask of attention relies on both).
inline F16 exp(F16 x) {
  const F16 clamped = min(max(x, set1(-87.0f)), set1(88.0f));
  const F16 n = round_even(clamped * set1(1.44269504088896341f));
  F16 r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  F16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  return zero_below(x, -87.0f, scale_by_power_of_two(p, n));
}

}  // namespace gorgon
