#include "layer.h"

#include <algorithm>
#include <cmath>

#include "elementwise.h"

namespace gorgon {
namespace {

// Rows that pass through the MLP together: bounds its widest buffer for a long prefill.
constexpr int64_t kMlpRows = 512;

int64_t element_bytes(bool bf16) { return bf16 ? 2 : 4; }

}  // namespace

void write_keys_values(const LayerShape& shape, const LayerWeights& layer, float* x, const float* cos, const float* sin,
                       const LayerCache& cache, int64_t slot, int64_t position) {
  const int64_t dim = shape.attention.head_dim, kv_heads = shape.attention.num_kv_heads;
  const auto at = [&](void* start, int64_t head) {
    const int64_t offset = ((slot * kv_heads + head) * cache.num_positions + position) * dim;
    return static_cast<char*>(start) + offset * element_bytes(cache.bf16);
  };
  for (int64_t head = 0; head < kv_heads; ++head, x += dim) {
    if (layer.k_norm) rms_norm(x, layer.k_norm, dim, shape.rms_norm_eps, x);
    rotate(x, cos, sin, dim);
    store_scaled(x, 1.0f, dim, cache.bf16, at(cache.keys, head));
  }
  for (int64_t head = 0; head < kv_heads; ++head, x += dim)
    store_scaled(x, 1.0f, dim, cache.bf16, at(cache.values, head));
}

void LayerPass::reserve(int64_t rows, bool bf16, int64_t act_rows, int64_t widest) {
  const int64_t query_width = shape_.query_width();
  normed_ = normed_buffer_.get<float>(rows * shape_.hidden_size);
  wide_ = wide_buffer_.get<float>(
      std::max(rows * shape_.qkv_width(), std::min(rows, kMlpRows) * 2 * shape_.intermediate_size));
  attended_ = attended_buffer_.get<float>(rows * query_width);
  queries_ = queries_buffer_.get<char>(rows * shape_.attention.num_heads * shape_.attention.padded_dim *
                                       element_bytes(bf16));
  widest = std::max({widest, shape_.hidden_size, shape_.intermediate_size, query_width});
  act_ = act_buffer_.get(std::max(rows, act_rows), widest);
}

void LayerPass::reserve_partials(int64_t rows, int64_t keys, int num_threads) {
  plan_.group_starts.reserve(rows + 1);
  partials_buffer_.get<float>(AttentionPlan::max_partials(shape_.attention, rows, keys, num_threads));
}

void LayerPass::plan(const LayerRows& rows, int num_threads) {
  rows_ = rows;
  plan_.build(shape_.attention, rows.keys, rows.num_rows, num_threads);
  partials_ = plan_.split_chunks ? partials_buffer_.get<float>(rows.num_rows * shape_.attention.num_heads *
                                                               plan_.num_chunks * partial_stride(shape_.attention))
                                 : nullptr;
}

void LayerPass::write_row(const LayerWeights& layer, const LayerCaches& caches, int64_t row) const {
  const AttentionShape& attention = shape_.attention;
  const int64_t dim = attention.head_dim, group = attention.num_heads / attention.num_kv_heads;
  const bool bf16 = caches.cache.bf16;
  const float* cos = rows_.cos + row * (dim / 2);
  const float* sin = rows_.sin + row * (dim / 2);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  float* x = wide_ + row * shape_.qkv_width();
  for (int64_t head = 0; head < attention.num_heads; ++head, x += dim) {
    if (layer.q_norm) rms_norm(x, layer.q_norm, dim, shape_.rms_norm_eps, x);
    rotate(x, cos, sin, dim);
    const int64_t offset =
        ((head / group * rows_.num_rows + row) * group + head % group) * attention.padded_dim;
    store_scaled(x, scale, dim, bf16, queries_ + offset * element_bytes(bf16));
  }
  const bool apart = caches.tree.keys != nullptr;
  write_keys_values(shape_, layer, x, cos, sin, apart ? caches.tree : caches.cache, apart ? 0 : rows_.keys.slots[row],
                    rows_.write_positions[row]);
}

void LayerPass::attention_block(Pool& pool, const LayerWeights& layer, const LayerCaches& caches,
                                float* hidden) const {
  const int64_t rows = rows_.num_rows, width = shape_.hidden_size;
  pool.for_each(rows, [&](int64_t row) {
    rms_norm(hidden + row * width, layer.input_norm, width, shape_.rms_norm_eps, normed_ + row * width);
    prepare_row(layer.qkv->kind, normed_ + row * width, width, act_, row);
  });
  linear(pool, *layer.qkv, act_, rows, wide_, shape_.qkv_width(), false);
  pool.for_each(rows, [&](int64_t row) { write_row(layer, caches, row); });

  const AttentionArgs attend{shape_.attention,     caches.cache, caches.tree, rows_.keys, rows,
                             layer.sliding_window, queries_,     partials_,   attended_};
  attention(pool, attend, plan_);
  const int64_t query_width = shape_.query_width();
  pool.for_each(rows, [&](int64_t row) {
    attention_merge_row(attend, plan_, row);
    prepare_row(layer.o->kind, attended_ + row * query_width, query_width, act_, row);
  });
  linear(pool, *layer.o, act_, rows, hidden, width, true);
}

void LayerPass::mlp(Pool& pool, const LayerWeights& layer, float* hidden) const {
  const int64_t width = shape_.hidden_size, inner = shape_.intermediate_size;
  for (int64_t first = 0; first < rows_.num_rows; first += kMlpRows, hidden += kMlpRows * width) {
    const int64_t rows = std::min(kMlpRows, rows_.num_rows - first);
    pool.for_each(rows, [&](int64_t row) {
      float* normed = normed_ + row * width;
      rms_norm(hidden + row * width, layer.post_norm, width, shape_.rms_norm_eps, normed);
      prepare_row(layer.gate_up->kind, normed, width, act_, row);
    });
    linear(pool, *layer.gate_up, act_, rows, wide_, 2 * inner, false);
    pool.for_each(rows, [&](int64_t row) {
      float* x = wide_ + row * 2 * inner;
      silu_multiply(x, inner, x);
      prepare_row(layer.down->kind, x, inner, act_, row);
    });
    linear(pool, *layer.down, act_, rows, hidden, width, true);
  }
}

void LayerPass::run(Pool& pool, const LayerWeights& layer, const LayerCaches& caches, float* hidden) const {
  attention_block(pool, layer, caches, hidden);
  mlp(pool, layer, hidden);
}

}  // namespace gorgon
