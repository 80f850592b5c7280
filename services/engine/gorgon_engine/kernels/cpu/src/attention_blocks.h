// The two inner products of attention over a block of 16 keys, for a bf16 and for an fp32 cache.
//
// load_keys puts the block's keys side by side (dimension-major) so that a score needs no horizontal sum; load_values
// pairs neighbouring keys for the bf16 dot product. A null pointer stands for a key that does not exist: zeros.
#pragma once

#include "attention.h"
#include "linear_ops.h"

namespace gorgon {

constexpr int kMaxHeadDim = 512;

struct BlockScratch {
  alignas(64) uint32_t keys[kMaxHeadDim * kBlock];    // [dimension step, key], one 32-bit word each
  alignas(64) uint32_t values[kMaxHeadDim * kBlock];  // [key step, dimension]
};

#if defined(GORGON_AVX512)
inline void transpose_16x16(__m512i row[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    row[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    row[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    row[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    row[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(row[i], row[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(row[i], row[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    row[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    row[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    row[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#endif

// words = 32-bit words of one key.
inline void load_keys(const void* const key[kBlock], int64_t words, uint32_t* out) {
  int64_t first = 0;
#if defined(GORGON_AVX512)
  for (; first < words; first += kBlock) {
    const __mmask16 mask = static_cast<__mmask16>(words - first >= 16 ? 0xffff : (1u << (words - first)) - 1);
    __m512i row[16];
    for (int i = 0; i < kBlock; ++i)
      row[i] = key[i] ? _mm512_maskz_loadu_epi32(mask, static_cast<const uint32_t*>(key[i]) + first)
                      : _mm512_setzero_si512();
    transpose_16x16(row);
    for (int i = 0; i < kBlock; ++i) _mm512_store_si512(out + (first + i) * kBlock, row[i]);
  }
#else
  for (int i = 0; i < kBlock; ++i)
    for (int64_t d = first; d < words; ++d)
      out[d * kBlock + i] = key[i] ? static_cast<const uint32_t*>(key[i])[d] : 0u;
#endif
}

struct Bf16Cache {
  using Element = uint16_t;
  using Op = Bf16Op;
  static constexpr int64_t kPerWord = 2;
  static constexpr int kKeySteps = kBlock / 2;
  static F16 rounded(F16 x) {
    alignas(64) uint16_t lanes[kLanes];
    store_bf16(lanes, x);
    return load_bf16(lanes);
  }
  static void store_weights(void* row, int64_t index, F16 x) { store_bf16(static_cast<uint16_t*>(row) + index, x); }
  static void load_values(const void* const value[kBlock], int64_t dim, int64_t padded_dim, uint32_t* out) {
    static const uint16_t zeros[kMaxHeadDim] = {};
    for (int pair = 0; pair < kKeySteps; ++pair, out += padded_dim) {
      const uint16_t* even = value[2 * pair] ? static_cast<const uint16_t*>(value[2 * pair]) : zeros;
      const uint16_t* odd = value[2 * pair + 1] ? static_cast<const uint16_t*>(value[2 * pair + 1]) : zeros;
      int64_t d = 0;
#if defined(GORGON_AVX512)
      for (; d + kLanes <= dim; d += kLanes) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + d)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + d)));
        _mm512_storeu_si512(out + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
#endif
      for (; d < dim; ++d) out[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
      for (; d < padded_dim; ++d) out[d] = 0;
    }
  }
};

struct Fp32Cache {
  using Element = float;
  using Op = Fp32Op;
  static constexpr int64_t kPerWord = 1;
  static constexpr int kKeySteps = kBlock;
  static F16 rounded(F16 x) { return x; }
  static void store_weights(void* row, int64_t index, F16 x) { store(static_cast<float*>(row) + index, x); }
  static void load_values(const void* const value[kBlock], int64_t dim, int64_t padded_dim, uint32_t* out) {
    for (int i = 0; i < kBlock; ++i, out += padded_dim) {
      if (value[i]) std::memcpy(out, value[i], dim * sizeof(float));
      else std::memset(out, 0, dim * sizeof(float));
      for (int64_t d = dim; d < padded_dim; ++d) out[d] = 0;
    }
  }
};

// scores[q][16] = sum over the key's words of query word * key word, for Count queries. One chain of adds per score.
template <typename Cache, int Count>
void score_block(const uint32_t* queries, int64_t query_stride, int64_t words, const uint32_t* keys, float* scores,
                 int64_t score_stride) {
  F16 acc[Count];
  unrolled<Count>([&](auto q) { acc[q] = set1(0.0f); });
  for (int64_t d = 0; d < words; ++d) {
    const typename Cache::Op::Weight key = Cache::Op::weight(keys + d * kBlock);
    unrolled<Count>([&](auto q) { Cache::Op::step(acc[q], key, Cache::Op::act(queries + q * query_stride + d)); });
  }
  unrolled<Count>([&](auto q) { store(scores + q * score_stride, acc[q]); });
}

// sums[q][dims] += sum over the block's keys of weight * value, keys ascending, for Count queries.
template <typename Cache, int Count, int Vectors>
void value_block(const uint32_t* weights, int64_t weight_stride, const uint32_t* values, int64_t padded_dim,
                 float* sums, int64_t sum_stride) {
  F16 acc[Count][Vectors];
  unrolled<Count>([&](auto q) {
    unrolled<Vectors>([&](auto v) { acc[q][v] = load(sums + q * sum_stride + v * kLanes); });
  });
  for (int k = 0; k < Cache::kKeySteps; ++k) {
    typename Cache::Op::Weight value[Vectors];
    unrolled<Vectors>([&](auto v) { value[v] = Cache::Op::weight(values + k * padded_dim + v * kLanes); });
    unrolled<Count>([&](auto q) {
      const typename Cache::Op::Act weight = Cache::Op::act(weights + q * weight_stride + k);
      unrolled<Vectors>([&](auto v) { Cache::Op::step(acc[q][v], value[v], weight); });
    });
  }
  unrolled<Count>([&](auto q) {
    unrolled<Vectors>([&](auto v) { store(sums + q * sum_stride + v * kLanes, acc[q][v]); });
  });
}

}  // namespace gorgon
