// softmax(q k^T / sqrt(D)) v over a cache, where each row has a logical sequence of keys of its own: a contiguous
// prefix of its slot, then its ancestors in a drafted tree, which may lie elsewhere.
//
// Row-invariance: every step of the arithmetic is tied to a key's index in that logical sequence. Keys go in blocks of
// 16 (scores and values) and chunks of 256 (softmax with the chunk's exact maximum); chunks merge in ascending order. A
// block of the prefix shared by several rows is transposed once and used by all of them; a block that holds the end of
// a row's sequence or its ancestors is gathered for that row alone. Both give the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "pool.h"

namespace gorgon {

constexpr int kBlock = 16;
constexpr int kChunk = 256;

struct AttentionShape {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t padded_dim;  // head_dim rounded up to whole vectors
};

inline AttentionShape attention_shape(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
  return {num_heads, num_kv_heads, head_dim, (head_dim + 15) / 16 * 16};
}

// The cache of one layer: [slot, kv_head, position, head_dim].
struct LayerCache {
  void* keys;
  void* values;
  bool bf16;
  int64_t num_slots;
  int64_t num_positions;
};

// The logical sequences of all rows.
struct RowKeys {
  const int32_t* slots;
  const int32_t* prefix_lengths;
  const int32_t* tree_positions;  // [rows, tree_stride], root to leaf
  const int32_t* tree_counts;
  int64_t tree_stride;
  int64_t length(int64_t row) const { return prefix_lengths[row] + tree_counts[row]; }
};

// How a layer's attention is cut into items. It decides who works on what, never a result.
struct AttentionPlan {
  std::vector<int64_t> group_starts;  // rows of one slot that follow each other; one more entry than groups
  int64_t num_chunks = 0;             // over the longest row
  bool split_chunks = false;          // an item is one chunk; the partial results merge afterwards
  void build(const AttentionShape& shape, const RowKeys& keys, int64_t rows, int threads);
  // The most values that the partial results of up to `rows` rows of up to `keys` keys may take.
  static int64_t max_partials(const AttentionShape& shape, int64_t rows, int64_t keys, int threads);
};

// One (row, head, chunk): maximum, sum of weights, and padded_dim weighted values.
inline int64_t partial_stride(const AttentionShape& shape) { return shape.padded_dim + 16; }

struct AttentionArgs {
  AttentionShape shape;
  LayerCache cache;
  LayerCache tree;  // what tree positions count in, whatever the slot; no keys: the row's slot of `cache`
  RowKeys keys;
  int64_t num_rows;
  int64_t window;       // 0: none
  const void* queries;  // [num_kv_heads, rows, heads of a kv head, padded_dim], scaled; bf16 if the cache is, else fp32
  float* partials;      // [rows, num_heads, num_chunks, partial_stride] if split_chunks
  float* out;           // [rows, num_heads, head_dim]
};

// Inside Pool::run(). With split_chunks the rows are complete only after attention_merge_row().
void attention(Pool& pool, const AttentionArgs& args, const AttentionPlan& plan);
void attention_merge_row(const AttentionArgs& args, const AttentionPlan& plan, int64_t row);

}  // namespace gorgon
