// out[r, n] = sum_k x[r, k] * w[n, k] (+ bias[n]) over packed weights.
//
// Packed layout, the same for every kind and instruction set: panels of 32 output channels; a panel holds, for each
// step of k, two vectors of 16 channels x 4 bytes. Four bytes are one fp32, two bf16 or four u8 (= int8 + 128)
// consecutive k. Channels and k are padded with zeros.
//
// Row-invariance: an output element owns one accumulator that takes the steps in ascending order, whatever the tile.
// int8 sums are exact within a group; the groups' fp32 sums are added in ascending order.
#pragma once

#include <cstdint>

#include "pool.h"

namespace gorgon {

enum Kind : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2 };

constexpr int kPanel = 32;

struct PackedMatrix {
  int32_t kind;
  int32_t has_bias;
  int64_t in_features;
  int64_t out_features;
  const uint32_t* data;
  const float* scales;  // int8 only: one per channel, padded to a whole panel
  const float* bias;    // padded to a whole panel
};

inline int64_t steps_of(const PackedMatrix& m) {
  const int64_t per_step = m.kind == kFp32 ? 1 : m.kind == kBf16 ? 2 : 4;
  return (m.in_features + per_step - 1) / per_step;
}
inline int64_t panels_of(const PackedMatrix& m) { return (m.out_features + kPanel - 1) / kPanel; }

// An int8 row has one scale for every 64 values: an outlier (they reach 54 in a model whose values are about 2) then
// costs only its own group its precision. Measured on SmolLM2-135M: perplexity +0.5 % instead of +2.5 %.
constexpr int64_t kGroup = 64;

// Rows in the form the product reads: 32-bit words of one fp32, two bf16 or four int8, plus for int8 the scale of each
// group and 128 * its sum, which is what the weights' +128 adds to a product.
struct Activations {
  uint32_t* words;
  int64_t stride;  // in words; at least activation_words(in_features)
  float* scales;   // [rows, groups]
  int32_t* sums;   // [rows, groups]
  int64_t groups;  // at least activation_groups(in_features)
};

// Whole vectors are written, so a row's buffer is as long as in_features rounded up to 16 fp32.
inline int64_t activation_words(int64_t in_features) { return (in_features + 15) / 16 * 16; }
inline int64_t activation_groups(int64_t in_features) { return (in_features + kGroup - 1) / kGroup; }

// From one row to the next. int8 rows lie closer than `stride`, in whole groups and an odd number of cache lines apart:
// the same words of 16 rows, which AMX loads together, then fall into different sets of the cache.
inline int64_t row_words(int32_t kind, int64_t in_features, const Activations& act) {
  return kind == kInt8 ? (activation_groups(in_features) | 1) * (kGroup / 4) : act.stride;
}

// int8: scale = absmax / 127 over each group of the row alone, values rounded to nearest even.
void prepare_row(int32_t kind, const float* x, int64_t in_features, const Activations& act, int64_t row);

// Rows whose activations stay in L2 while the panels pass by.
constexpr int64_t kRowChunk = 192;

// Panels [begin, end) of the product for rows [row, row + rows), by the calling thread alone. out: row 0, channel 0.
void linear_panels(const PackedMatrix& m, const Activations& act, int64_t row, int64_t rows, int64_t begin, int64_t end,
                   float* out, int64_t out_stride);

// The whole product, inside Pool::run(); returns on every thread when it is complete.
void linear(Pool& pool, const PackedMatrix& m, const Activations& act, int64_t rows, float* out, int64_t out_stride,
            bool accumulate);

}  // namespace gorgon
