// The whole backbone forward over R rows, and the C structures that describe a model and a call (mirrored in ctypes).
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "layer.h"

namespace gorgon {

struct ModelConfig {
  int64_t num_layers;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  float rms_norm_eps;
  const LayerWeights* layers;
  const float* final_norm;
  const PackedMatrix* lm_head;
};

struct ForwardArgs {
  int64_t num_rows;
  const float* embeddings;         // [rows, hidden_size]
  const float* cos;                // [rows, head_dim / 2]
  const float* sin;                // [rows, head_dim / 2]
  const int32_t* slots;            // [rows]
  const int32_t* write_positions;  // [rows]
  const int32_t* prefix_lengths;   // [rows]
  const int32_t* tree_base;        // [rows]
  const uint64_t* ancestors;       // [rows, num_words]
  int64_t num_words;
  void* keys;    // [layer, slot, kv_head, position, head_dim]
  void* values;  // as keys
  int32_t cache_is_bf16;
  int64_t num_slots;
  int64_t num_positions;
  const int32_t* logits_rows;  // null: all
  int64_t num_logits;
  float* out_hidden;  // [rows, hidden_size]
  float* out_logits;  // [num_logits, vocab_size]
};

// Owns the workspace: one forward at a time.
class Model {
 public:
  explicit Model(const ModelConfig& config);

  // Null, or why the indices would reach outside the cache or the rows.
  const char* check(const ForwardArgs& args) const;
  void forward(const ForwardArgs& args);

 private:
  RowKeys keys_of(const ForwardArgs& args);
  LayerCaches caches(const ForwardArgs& args, int64_t index) const;

  ModelConfig config_;
  std::vector<LayerWeights> layers_;
  LayerShape shape_;
  LayerPass pass_;
  Buffer hidden_, tree_, tree_counts_;
};

}  // namespace gorgon
