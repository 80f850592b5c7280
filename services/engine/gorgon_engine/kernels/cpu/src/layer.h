// One decoder layer over R rows: RMSNorm, grouped-query attention with RoPE over a cache, RMSNorm, SwiGLU MLP.
//
// A row's result depends on that row and on the keys that it attends to only, to the bit.
#pragma once

#include <cstdint>

#include "activations.h"
#include "attention.h"
#include "buffer.h"
#include "linear.h"

namespace gorgon {

struct LayerWeights {
  const float* input_norm;
  const float* post_norm;
  const float* q_norm;  // null: none
  const float* k_norm;
  const PackedMatrix* qkv;
  const PackedMatrix* o;
  const PackedMatrix* gate_up;
  const PackedMatrix* down;
  int64_t sliding_window;  // 0: none
};

struct LayerShape {
  int64_t hidden_size;
  int64_t intermediate_size;
  AttentionShape attention;
  float rms_norm_eps;

  int64_t query_width() const { return attention.num_heads * attention.head_dim; }
  int64_t qkv_width() const { return query_width() + 2 * attention.num_kv_heads * attention.head_dim; }
};

// What of the rows all layers have in common.
struct LayerRows {
  int64_t num_rows;
  const float* cos;                // [rows, head_dim / 2]
  const float* sin;                // [rows, head_dim / 2]
  const int32_t* write_positions;  // [rows], where the tree positions count: the row's key and value go here
  RowKeys keys;
};

struct LayerCaches {
  LayerCache cache;
  LayerCache tree;  // as in AttentionArgs
};

// A row's keys and values, [2, num_kv_heads, head_dim], rotated in place and written to one position.
void write_keys_values(const LayerShape& shape, const LayerWeights& layer, float* x, const float* cos, const float* sin,
                       const LayerCache& cache, int64_t slot, int64_t position);

// The working memory of layers that follow each other over the same rows, one pass at a time.
class LayerPass {
 public:
  explicit LayerPass(const LayerShape& shape) : shape_(shape) {}

  // For up to `rows` rows, and activations for up to `act_rows` of up to `widest` values. Throws std::bad_alloc.
  void reserve(int64_t rows, bool bf16, int64_t act_rows, int64_t widest);
  // For `rows` rows of up to `keys` keys, so that plan() needs none. Throws std::bad_alloc.
  void reserve_partials(int64_t rows, int64_t keys, int num_threads);
  // Before the first layer and where the rows are others, by one thread. The arrays in `rows` have to stay. Throws
  // std::bad_alloc where reserve_partials() was not called.
  void plan(const LayerRows& rows, int num_threads);

  // Inside Pool::run(): the layer over the residual stream [rows, hidden_size], in place. Each row's key and value are
  // written before any row attends.
  void run(Pool& pool, const LayerWeights& layer, const LayerCaches& caches, float* hidden) const;

  const Activations& activations() const { return act_; }

 private:
  void attention_block(Pool& pool, const LayerWeights& layer, const LayerCaches& caches, float* hidden) const;
  void mlp(Pool& pool, const LayerWeights& layer, float* hidden) const;
  void write_row(const LayerWeights& layer, const LayerCaches& caches, int64_t row) const;

  LayerShape shape_;
  LayerRows rows_{};
  AttentionPlan plan_;
  Buffer normed_buffer_, wide_buffer_, attended_buffer_, queries_buffer_, partials_buffer_;
  ActivationBuffer act_buffer_;
  float* normed_ = nullptr;    // [rows, C]
  float* wide_ = nullptr;      // [rows, qkv_width] or [kMlpRows, 2 I]
  float* attended_ = nullptr;  // [rows, H D]
  char* queries_ = nullptr;    // [G, rows, H / G, padded_dim], bf16 or fp32
  float* partials_ = nullptr;
  Activations act_{};
};

}  // namespace gorgon
