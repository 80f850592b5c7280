// Drafting with an EAGLE head (2401.15077): the layer of heads/eagle.py over every path that the search looks below,
// and its keys and values of what is committed. The C structures are mirrored in eagle.py.
#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"
#include "buffer.h"
#include "draft_search.h"
#include "draft_vocabulary.h"
#include "layer.h"
#include "pool.h"

namespace gorgon {

// C hidden size, V tokens that can be drafted.
struct EagleConfig {
  int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
  int64_t max_depth;  // of a tree below its root
  float rms_norm_eps;
  const float *feature_norm, *embedding_norm, *norm;  // [C] each, of the layer's two inputs and of its output
  const PackedMatrix* fc;                             // [C, 2 C]
  LayerWeights layer;
  const PackedMatrix* projection;  // [V, C]
  DraftVocabulary vocabulary;
};

// What is remembered of a drafter's slots. Not the head's own: it may have several.
struct EagleMemory {
  void* keys;    // [slot, kv_head, position, head_dim], bf16 or fp32
  void* values;  // as keys
  int64_t is_bf16;
  int64_t num_slots, num_positions;
  const float* cos;  // [num_positions + max_depth, head_dim / 2], rotate-half RoPE of each position
  const float* sin;

  LayerCache cache() const { return {keys, values, is_bf16 != 0, num_slots, num_positions}; }
};

// Positions that became certain, no place twice.
struct EagleCommitted {
  EagleMemory memory;
  int64_t batch, max_rows;
  const int64_t* slots;        // [batch]
  const int64_t* starts;       // [batch], the position of each sequence's first row
  const int64_t* counts;       // [batch], rows of each that are none of the padding
  const float* hidden;         // [batch, max_rows, C]
  const int64_t* next_tokens;  // [batch, max_rows], the token behind each position
};

struct EagleArgs {
  EagleMemory memory;
  int64_t batch;
  const int64_t* slots;        // [batch]
  const int64_t* lengths;      // [batch], of the texts, the root included
  const float* hidden;         // [batch, C], the feature before the root
  const int64_t* root_tokens;  // [batch]
  SearchLimits limits;
  DraftTrees out;
};

// Owns the workspace: one draft, or one observation, at a time.
class EagleDraft {
 public:
  explicit EagleDraft(const EagleConfig& config);

  // Null, or why the call would reach outside the memory or the embeddings.
  const char* check(const EagleArgs& args) const;
  const char* check(const EagleCommitted& committed) const;

  void draft(const EagleArgs& args);
  void observe(const EagleCommitted& committed);

 private:
  struct Row {  // what the layer reads: a feature, its place, and the token behind it
    const float* feature;
    int64_t token, slot, position;
  };

  void prepare(const EagleArgs& args, const Pool& pool);
  void begin_depth(const EagleArgs& args, const Pool& pool, int64_t depth);
  void write_inputs(const EagleMemory& memory, const Row& from, int64_t row) const;
  void features(const EagleArgs& args, Pool& pool, int64_t depth);
  void remember(Pool& pool, const EagleMemory& memory, const Row* rows, int64_t count) const;

  EagleConfig config_;
  LayerShape shape_;
  PackedMatrix keys_values_;        // the panels of qkv that hold keys and values,
  int64_t keys_values_offset_ = 0;  // and where in the first of them those begin
  Pool alone_;                      // this thread
  DraftSearch search_;
  LayerPass pass_;
  std::vector<Row> observed_;
  Buffer inputs_buffer_, hidden_buffer_, feature_buffer_, wide_buffer_, angles_buffer_, steps_buffer_, places_buffer_;
  ActivationBuffer act_buffer_;
  float* inputs_ = nullptr;   // [rows, 2 C]
  float* hidden_ = nullptr;   // [rows, C], the residual stream
  float* feature_ = nullptr;  // [rows, C], predicted at the depth above until those of this one are known
  float* wide_ = nullptr;     // [rows, outputs of keys_values_]
  float* cos_ = nullptr;      // [rows, head_dim / 2]
  float* sin_ = nullptr;      // [rows, head_dim / 2]
  Activations act_{};
  LayerCache steps_{};             // keys and values of the paths' steps: position depth * max_rows + row
  int32_t* step_above_ = nullptr;  // [max_depth * max_rows], position of the step before a step
  int32_t* path_steps_ = nullptr;  // [max_rows, max_depth], positions of a path's steps
  int32_t *slots_ = nullptr, *prefix_lengths_ = nullptr, *num_steps_ = nullptr, *own_steps_ = nullptr;  // [max_rows]
};

}  // namespace gorgon
