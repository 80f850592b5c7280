// The multiply-accumulate step of each weight kind: 16 output channels against one 32-bit word of activations.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "linear.h"
#include "simd.h"

namespace gorgon {

// body(0), body(1), ... with constant indices. A plain loop over an array of accumulators is unrolled too late for g++
// to keep the array in registers.
template <typename Body, int... Index>
[[gnu::always_inline]] inline void unrolled_over(Body&& body, std::integer_sequence<int, Index...>) {
  (body(std::integral_constant<int, Index>{}), ...);
}
template <int Count, typename Body>
[[gnu::always_inline]] inline void unrolled(Body&& body) {
  unrolled_over(body, std::make_integer_sequence<int, Count>{});
}

#if defined(GORGON_AVX512)
constexpr int kVectorsPerTile = 2;  // 12 rows x 2 vectors of accumulators leave room for the weights in 32 registers
constexpr int kFloatRows = 12;
#elif defined(GORGON_AVX2)
constexpr int kVectorsPerTile = 1;
constexpr int kFloatRows = 4;
#else
constexpr int kVectorsPerTile = 1;
constexpr int kFloatRows = 4;
#endif

inline float word_as_float(uint32_t word) {
  float out;
  std::memcpy(&out, &word, 4);
  return out;
}

struct Fp32Op {
  static constexpr int kMaxRows = kFloatRows;
  using Acc = F16;
  using Weight = F16;
  using Act = F16;
  static Acc zero() { return set1(0.0f); }
  static Weight weight(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static Act act(const uint32_t* p) { return set1(word_as_float(*p)); }
  static void step(Acc& acc, Weight w, Act a) { acc = fma(w, a, acc); }
};

#if defined(GORGON_AVX512) && defined(__AVX512BF16__)
struct Bf16Op {
  static constexpr int kMaxRows = kFloatRows;
  using Acc = F16;
  using Weight = __m512i;
  using Act = __m512i;
  static Acc zero() { return set1(0.0f); }
  static Weight weight(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Act act(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static void step(Acc& acc, Weight w, Act a) { acc.v = _mm512_dpbf16_ps(acc.v, (__m512bh)w, (__m512bh)a); }
};
#else
struct Bf16Op {
  struct Pair {
    F16 low, high;
  };
  static constexpr int kMaxRows = kFloatRows;
  using Acc = F16;
  using Weight = Pair;
  using Act = Pair;
  static Acc zero() { return set1(0.0f); }
#if defined(GORGON_AVX512)
  static Pair weight(const uint32_t* p) {
    const __m512i raw = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}};
  }
#elif defined(GORGON_AVX2)
  static __m256 low(__m256i raw) { return _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)); }
  static __m256 high(__m256i raw) {
    return _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static Pair weight(const uint32_t* p) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8));
    return {{low(first), low(second)}, {high(first), high(second)}};
  }
#else
  static Pair weight(const uint32_t* p) {
    Pair out;
    for (int i = 0; i < kLanes; ++i) {
      out.low.v[i] = word_as_float(p[i] << 16);
      out.high.v[i] = word_as_float(p[i] & 0xffff0000u);
    }
    return out;
  }
#endif
  static Pair act(const uint32_t* p) { return {set1(word_as_float(*p << 16)), set1(word_as_float(*p & 0xffff0000u))}; }
  static void step(Acc& acc, const Pair& w, const Pair& a) { acc = fma(w.high, a.high, fma(w.low, a.low, acc)); }
};
#endif

// Where a panel's sums go: row 0 and channel 0 of it.
struct PanelOutput {
  const float* channel_scales;
  const float* bias;  // null: none
  float* data;
  int64_t stride;
  int64_t channels;  // left in the panel
  bool accumulate;
};

inline PanelOutput panel_output(const PackedMatrix& m, int64_t panel, float* out, int64_t stride, bool accumulate) {
  const int64_t channel = panel * kPanel;
  return {m.scales + channel, m.has_bias ? m.bias + channel : nullptr, out + channel, stride, m.out_features - channel,
          accumulate};
}

inline void finish(const PanelOutput& out, F16 y, int row, int64_t channel) {
  const int64_t width = std::min<int64_t>(out.channels - channel, kLanes);
  if (width <= 0) return;
  if (out.bias) y = y + load(out.bias + channel);
  float* to = out.data + row * out.stride + channel;
  if (out.accumulate) y = load_n(to, static_cast<int>(width)) + y;
  store_n(to, y, static_cast<int>(width));
}

// The int8 ops work on one group of activations at a time; to_float(acc, sum) is its exact integer product: sum is
// what the weights' +128 added (Activations::sums).

#if defined(GORGON_AVX512) && defined(__AVX512VNNI__)
struct Int8Op {
  static constexpr int kMaxRows = kFloatRows;
  using Acc = __m512i;
  using Weight = __m512i;
  using Act = __m512i;
  static Acc zero() { return _mm512_setzero_si512(); }
  static Weight weight(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Act act(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static void step(Acc& acc, Weight w, Act a) { acc = _mm512_dpbusd_epi32(acc, w, a); }
  static F16 to_float(Acc acc, int32_t sum) {
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(acc, _mm512_set1_epi32(sum)))};
  }
};
#elif defined(GORGON_AVX512) || defined(GORGON_AVX2)
// Widened to int16 before the multiply: vpmaddubsw would be one instruction shorter but saturates.
struct Int8Op {
  struct Four {
    __m256i v[4];
  };
#if defined(__AVXVNNI__) && !defined(GORGON_AVX512)
  static constexpr int kMaxRows = 4;
  struct Acc {
    __m256i v[2];
  };
  using Weight = Acc;
  using Act = __m256i;
  static Acc zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static Weight weight(const uint32_t* p) {
    return {{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))}};
  }
  static Act act(const uint32_t* p) { return _mm256_set1_epi32(static_cast<int>(*p)); }
  static void step(Acc& acc, const Weight& w, Act a) {
    for (int i = 0; i < 2; ++i) acc.v[i] = _mm256_dpbusd_avx_epi32(acc.v[i], w.v[i], a);
  }
  static __m256i half(const Acc& acc, int i) { return acc.v[i]; }
#else
  static constexpr int kMaxRows = 2;
  using Acc = Four;
  using Weight = Four;
  using Act = __m256i;
  static Acc zero() {
    const __m256i z = _mm256_setzero_si256();
    return {{z, z, z, z}};
  }
  static Weight weight(const uint32_t* p) {
    Four out;
    for (int i = 0; i < 4; ++i)
      out.v[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4 * i)));
    return out;
  }
  static Act act(const uint32_t* p) { return _mm256_cvtepi8_epi16(_mm_set1_epi32(static_cast<int>(*p))); }
  static void step(Acc& acc, const Weight& w, Act a) {
    for (int i = 0; i < 4; ++i) acc.v[i] = _mm256_add_epi32(acc.v[i], _mm256_madd_epi16(w.v[i], a));
  }
  // Each channel's sum lies in two neighbouring lanes; hadd works within 128-bit halves, hence the permute.
  static __m256i half(const Acc& acc, int i) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc.v[2 * i], acc.v[2 * i + 1]), 0xd8);
  }
#endif
  static F16 to_float(Acc acc, int32_t sum) {
    const __m256i offset = _mm256_set1_epi32(sum);
    const __m256 low = _mm256_cvtepi32_ps(_mm256_sub_epi32(half(acc, 0), offset));
    const __m256 high = _mm256_cvtepi32_ps(_mm256_sub_epi32(half(acc, 1), offset));
#if defined(GORGON_AVX512)
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
#else
    return {low, high};
#endif
  }
};
#else
struct Int8Op {
  static constexpr int kMaxRows = 2;
  struct Acc {
    int32_t v[kLanes];
  };
  struct Act {
    int8_t v[4];
  };
  using Weight = const uint8_t*;
  static Acc zero() { return {}; }
  static Weight weight(const uint32_t* p) { return reinterpret_cast<const uint8_t*>(p); }
  static Act act(const uint32_t* p) {
    Act out;
    std::memcpy(out.v, p, 4);
    return out;
  }
  static void step(Acc& acc, Weight w, Act a) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) acc.v[i] += static_cast<int32_t>(w[4 * i + j]) * a.v[j];
  }
  static F16 to_float(Acc acc, int32_t sum) {
    F16 exact;
    for (int i = 0; i < kLanes; ++i) exact.v[i] = static_cast<float>(acc.v[i] - sum);
    return exact;
  }
};
#endif

}  // namespace gorgon
