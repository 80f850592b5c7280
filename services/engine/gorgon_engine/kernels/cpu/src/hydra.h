// Drafting with Hydra heads (2402.05109): the features of heads/hydra.py for every path that the search looks below.
// The C structures are mirrored in hydra.py.
#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"
#include "buffer.h"
#include "draft_search.h"
#include "draft_vocabulary.h"
#include "linear.h"

namespace gorgon {

// The head of one depth (from 1): C hidden size, V tokens that can be drafted.
struct HydraHead {
  const PackedMatrix* input;     // [C, (1 + depth) C]
  const PackedMatrix* residual;  // as input, and of its kind; null: the hidden state itself
  const PackedMatrix* const* blocks;  // [num_blocks], each [C, C]
  const PackedMatrix* projection;     // [V, C]
};

struct HydraConfig {
  int64_t hidden_size, num_heads, num_blocks;
  const HydraHead* heads;
  const float* norm;  // [C], the gain before the projection; null: nothing is normalised
  float rms_norm_eps;
  DraftVocabulary vocabulary;  // of C and V
};

struct HydraArgs {
  int64_t batch;
  const float* hidden;         // [batch, C]
  const int64_t* root_tokens;  // [batch]
  SearchLimits limits;
  DraftTrees out;
};

// Owns the workspace: one draft at a time.
class HydraDraft {
 public:
  explicit HydraDraft(const HydraConfig& config);

  // Null, or why a root token has no embedding.
  const char* check(const HydraArgs& args) const;
  void draft(const HydraArgs& args);

 private:
  void prepare(const HydraArgs& args);
  float* condition(int64_t depth, int64_t row) const;
  void write_condition(const HydraArgs& args, int64_t depth, int64_t row) const;
  void features(const HydraArgs& args, Pool& pool, int64_t depth) const;

  HydraConfig config_;
  std::vector<HydraHead> heads_;
  std::vector<const PackedMatrix*> blocks_;
  DraftSearch search_;
  Buffer conditions_buffer_, inner_buffer_, feature_buffer_;
  ActivationBuffer act_buffer_;
  float* conditions_ = nullptr;  // [2, rows, (1 + num_heads) C]: of this depth's paths and of those above
  float* inner_ = nullptr;       // [rows, C]
  float* feature_ = nullptr;     // [rows, C]
  Activations act_{};
};

}  // namespace gorgon
