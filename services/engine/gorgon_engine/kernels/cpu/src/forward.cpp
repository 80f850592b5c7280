#include "forward.h"

#include <cstring>

#include "elementwise.h"

namespace gorgon {

Model::Model(const ModelConfig& config)
    : config_(config),
      layers_(config.layers, config.layers + config.num_layers),
      shape_{config.hidden_size, config.intermediate_size,
             attention_shape(config.num_heads, config.num_kv_heads, config.head_dim), config.rms_norm_eps},
      pass_(shape_) {
  config_.layers = layers_.data();
}

const char* Model::check(const ForwardArgs& args) const {
  const auto outside = [](int64_t value, int64_t end) { return value < 0 || value >= end; };
  for (int64_t row = 0; row < args.num_rows; ++row) {
    if (outside(args.slots[row], args.num_slots)) return "a slot lies outside the cache";
    if (outside(args.write_positions[row], args.num_positions)) return "a write position lies outside the cache";
    if (outside(args.prefix_lengths[row], args.num_positions + 1)) return "a prefix length lies outside the cache";
    for (int64_t word = 0; word < args.num_words; ++word) {
      const uint64_t bits = args.ancestors[row * args.num_words + word];
      if (!bits) continue;
      const int64_t last = args.tree_base[row] + 64 * word + 63 - __builtin_clzll(bits);
      if (args.tree_base[row] < 0 || outside(last, args.num_positions)) return "an ancestor lies outside the cache";
    }
  }
  for (int64_t i = 0; args.logits_rows && i < args.num_logits; ++i)
    if (outside(args.logits_rows[i], args.num_rows)) return "a logits row is not one of the rows";
  return nullptr;
}

// The ancestor bits as positions.
RowKeys Model::keys_of(const ForwardArgs& args) {
  const int64_t rows = args.num_rows, tree_stride = 64 * args.num_words;
  int32_t* positions = tree_.get<int32_t>(rows * tree_stride);
  int32_t* counts = tree_counts_.get<int32_t>(rows);
  for (int64_t row = 0; row < rows; ++row) {
    counts[row] = 0;
    for (int64_t word = 0; word < args.num_words; ++word)
      for (uint64_t bits = args.ancestors[row * args.num_words + word]; bits; bits &= bits - 1)
        positions[row * tree_stride + counts[row]++] =
            args.tree_base[row] + static_cast<int32_t>(64 * word + __builtin_ctzll(bits));
  }
  return {args.slots, args.prefix_lengths, positions, counts, tree_stride};
}

LayerCaches Model::caches(const ForwardArgs& args, int64_t index) const {
  const bool bf16 = args.cache_is_bf16;
  const int64_t layer_bytes = args.num_slots * config_.num_kv_heads * args.num_positions * config_.head_dim *
                              (bf16 ? 2 : 4);
  const auto of_layer = [&](void* start) { return static_cast<char*>(start) + index * layer_bytes; };
  return {{of_layer(args.keys), of_layer(args.values), bf16, args.num_slots, args.num_positions}, LayerCache{}};
}

void Model::forward(const ForwardArgs& args) {
  Pool& pool = Pool::instance();
  if (args.num_rows == 0) return;
  const int64_t rows = args.num_rows, width = config_.hidden_size;
  float* hidden = hidden_.get<float>(rows * width);
  std::memcpy(hidden, args.embeddings, rows * width * sizeof(float));
  pass_.reserve(rows, args.cache_is_bf16, args.num_logits, width);
  pass_.plan({rows, args.cos, args.sin, args.write_positions, keys_of(args)}, pool.num_threads());
  const Activations& act = pass_.activations();
  pool.run([&] {
    for (int64_t index = 0; index < config_.num_layers; ++index)
      pass_.run(pool, layers_[index], caches(args, index), hidden);
    pool.for_each(rows, [&](int64_t row) {
      rms_norm(hidden + row * width, config_.final_norm, width, config_.rms_norm_eps, args.out_hidden + row * width);
    });
    if (args.num_logits == 0) return;
    pool.for_each(args.num_logits, [&](int64_t i) {
      const int64_t row = args.logits_rows ? args.logits_rows[i] : i;
      prepare_row(config_.lm_head->kind, args.out_hidden + row * width, width, act, i);
    });
    linear(pool, *config_.lm_head, act, args.num_logits, args.out_logits, config_.lm_head->out_features, false);
  });
}

}  // namespace gorgon
