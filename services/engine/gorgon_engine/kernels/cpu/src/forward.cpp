#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elementwise.h"

namespace gorgon {
namespace {

// Rows that pass through the MLP together: bounds its widest buffer for a long prefill.
constexpr int64_t kMlpRows = 512;

int64_t element_bytes(bool bf16) { return bf16 ? 2 : 4; }

}  // namespace

struct Model::Workspace {
  int64_t qkv_width;
  float* hidden;    // [rows, C], the residual stream
  float* normed;    // [rows, C]
  float* wide;      // [rows, qkv_width] or [kMlpRows, 2 I]
  float* attended;  // [rows, H D]
  char* queries;    // [G, rows, H / G, padded_dim], bf16 or fp32
  float* partials;
  Activations act;
  RowKeys keys;
};

Model::Model(const ModelConfig& config)
    : config_(config),
      layers_(config.layers, config.layers + config.num_layers),
      shape_{config.num_heads, config.num_kv_heads, config.head_dim, (config.head_dim + 15) / 16 * 16} {
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

void Model::prepare(const ForwardArgs& args, Pool& pool, Workspace& w) {
  const int64_t rows = args.num_rows;
  const int64_t query_width = shape_.num_heads * shape_.head_dim;
  w.qkv_width = query_width + 2 * shape_.num_kv_heads * shape_.head_dim;
  w.hidden = hidden_.get<float>(rows * config_.hidden_size);
  w.normed = normed_.get<float>(rows * config_.hidden_size);
  w.wide = wide_.get<float>(
      std::max(rows * w.qkv_width, std::min(rows, kMlpRows) * 2 * config_.intermediate_size));
  w.attended = attended_.get<float>(rows * query_width);
  w.queries = queries_.get<char>(rows * shape_.num_heads * shape_.padded_dim * element_bytes(args.cache_is_bf16));
  const int64_t widest = std::max({config_.hidden_size, config_.intermediate_size, query_width});
  w.act.stride = activation_words(widest);
  const int64_t act_rows = std::max(rows, args.num_logits);
  w.act.words = words_.get<uint32_t>(act_rows * w.act.stride);
  w.act.groups = activation_groups(widest);
  w.act.scales = scales_.get<float>(act_rows * w.act.groups);
  w.act.sums = sums_.get<int32_t>(act_rows * w.act.groups);
  std::memcpy(w.hidden, args.embeddings, rows * config_.hidden_size * sizeof(float));

  const int64_t tree_stride = 64 * args.num_words;
  int32_t* positions = tree_.get<int32_t>(rows * tree_stride);
  int32_t* counts = tree_counts_.get<int32_t>(rows);
  for (int64_t row = 0; row < rows; ++row) {
    counts[row] = 0;
    for (int64_t word = 0; word < args.num_words; ++word)
      for (uint64_t bits = args.ancestors[row * args.num_words + word]; bits; bits &= bits - 1)
        positions[row * tree_stride + counts[row]++] =
            args.tree_base[row] + static_cast<int32_t>(64 * word + __builtin_ctzll(bits));
  }
  w.keys = RowKeys{args.slots, args.prefix_lengths, positions, counts, tree_stride};
  plan_.build(shape_, w.keys, rows, pool.num_threads());
  w.partials = plan_.split_chunks
                   ? partials_.get<float>(rows * shape_.num_heads * plan_.num_chunks * partial_stride(shape_))
                   : nullptr;
}

void Model::write_row(const ForwardArgs& args, const Workspace& w, int64_t index, int64_t row) const {
  const LayerWeights& layer = layers_[index];
  const int64_t dim = shape_.head_dim, kv_heads = shape_.num_kv_heads;
  const int64_t group = shape_.num_heads / kv_heads;
  const bool bf16 = args.cache_is_bf16;
  const float* cos = args.cos + row * (dim / 2);
  const float* sin = args.sin + row * (dim / 2);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  float* x = w.wide + row * w.qkv_width;
  for (int64_t head = 0; head < shape_.num_heads; ++head, x += dim) {
    if (layer.q_norm) rms_norm(x, layer.q_norm, dim, config_.rms_norm_eps, x);
    rotate(x, cos, sin, dim);
    const int64_t offset =
        ((head / group * args.num_rows + row) * group + head % group) * shape_.padded_dim;
    store_scaled(x, scale, dim, bf16, w.queries + offset * element_bytes(bf16));
  }
  const int64_t slot = index * args.num_slots + args.slots[row];
  const auto at = [&](void* cache, int64_t head) {
    const int64_t offset = ((slot * kv_heads + head) * args.num_positions + args.write_positions[row]) * dim;
    return static_cast<char*>(cache) + offset * element_bytes(bf16);
  };
  for (int64_t head = 0; head < kv_heads; ++head, x += dim) {
    if (layer.k_norm) rms_norm(x, layer.k_norm, dim, config_.rms_norm_eps, x);
    rotate(x, cos, sin, dim);
    store_scaled(x, 1.0f, dim, bf16, at(args.keys, head));
  }
  for (int64_t head = 0; head < kv_heads; ++head, x += dim) store_scaled(x, 1.0f, dim, bf16, at(args.values, head));
}

void Model::attention_block(const ForwardArgs& args, Pool& pool, const Workspace& w, int64_t index) const {
  const LayerWeights& layer = layers_[index];
  const int64_t rows = args.num_rows, width = config_.hidden_size;
  pool.for_each(rows, [&](int64_t row) {
    rms_norm(w.hidden + row * width, layer.input_norm, width, config_.rms_norm_eps, w.normed + row * width);
    prepare_row(layer.qkv->kind, w.normed + row * width, width, w.act, row);
  });
  linear(pool, *layer.qkv, w.act, rows, w.wide, w.qkv_width, false);
  pool.for_each(rows, [&](int64_t row) { write_row(args, w, index, row); });

  const int64_t layer_bytes = args.num_slots * shape_.num_kv_heads * args.num_positions * shape_.head_dim *
                              element_bytes(args.cache_is_bf16);
  const AttentionArgs attend{shape_,
                             {static_cast<char*>(args.keys) + index * layer_bytes,
                              static_cast<char*>(args.values) + index * layer_bytes, args.cache_is_bf16 != 0,
                              args.num_slots, args.num_positions},
                             w.keys,
                             rows,
                             layer.sliding_window,
                             w.queries,
                             w.partials,
                             w.attended};
  attention(pool, attend, plan_);
  const int64_t query_width = shape_.num_heads * shape_.head_dim;
  pool.for_each(rows, [&](int64_t row) {
    attention_merge_row(attend, plan_, row);
    prepare_row(layer.o->kind, w.attended + row * query_width, query_width, w.act, row);
  });
  linear(pool, *layer.o, w.act, rows, w.hidden, width, true);
}

void Model::mlp(const ForwardArgs& args, Pool& pool, const Workspace& w, const LayerWeights& layer) const {
  const int64_t width = config_.hidden_size, inner = config_.intermediate_size;
  for (int64_t first = 0; first < args.num_rows; first += kMlpRows) {
    const int64_t rows = std::min(kMlpRows, args.num_rows - first);
    float* hidden = w.hidden + first * width;
    pool.for_each(rows, [&](int64_t row) {
      float* normed = w.normed + row * width;
      rms_norm(hidden + row * width, layer.post_norm, width, config_.rms_norm_eps, normed);
      prepare_row(layer.gate_up->kind, normed, width, w.act, row);
    });
    linear(pool, *layer.gate_up, w.act, rows, w.wide, 2 * inner, false);
    pool.for_each(rows, [&](int64_t row) {
      float* x = w.wide + row * 2 * inner;
      silu_multiply(x, inner, x);
      prepare_row(layer.down->kind, x, inner, w.act, row);
    });
    linear(pool, *layer.down, w.act, rows, hidden, width, true);
  }
}

void Model::forward(const ForwardArgs& args) {
  Pool& pool = Pool::instance();
  if (args.num_rows == 0) return;
  Workspace w;
  prepare(args, pool, w);
  const int64_t width = config_.hidden_size;
  pool.run([&] {
    for (int64_t index = 0; index < config_.num_layers; ++index) {
      attention_block(args, pool, w, index);
      mlp(args, pool, w, layers_[index]);
    }
    pool.for_each(args.num_rows, [&](int64_t row) {
      rms_norm(w.hidden + row * width, config_.final_norm, width, config_.rms_norm_eps, args.out_hidden + row * width);
    });
    if (args.num_logits == 0) return;
    pool.for_each(args.num_logits, [&](int64_t i) {
      const int64_t row = args.logits_rows ? args.logits_rows[i] : i;
      prepare_row(config_.lm_head->kind, args.out_hidden + row * width, width, w.act, i);
    });
    linear(pool, *config_.lm_head, w.act, args.num_logits, args.out_logits, config_.lm_head->out_features, false);
  });
}

}  // namespace gorgon
