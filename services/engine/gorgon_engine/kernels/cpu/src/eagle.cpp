#include "eagle.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "elementwise.h"

namespace gorgon {
namespace {

// Rows that are observed together, as many as share a pass over the weights.
constexpr int64_t kObservedRows = kRowChunk;
// Fewer products are done by the caller alone: a thread that has gone to sleep comes too late. A few rows count as
// kFreeRows, since they wait for the weights.
constexpr int64_t kSerialProducts = 1 << 25, kFreeRows = 8;

// The outputs from a panel on.
PackedMatrix from_panel(PackedMatrix m, int64_t panel) {
  m.data += panel * steps_of(m) * kPanel;
  m.scales += panel * kPanel;
  if (m.has_bias) m.bias += panel * kPanel;
  m.out_features -= panel * kPanel;
  return m;
}

bool outside(int64_t value, int64_t first, int64_t last) { return value < first || value > last; }

}  // namespace

EagleDraft::EagleDraft(const EagleConfig& config)
    : config_(config),
      shape_{config.hidden_size, config.intermediate_size,
             attention_shape(config.num_heads, config.num_kv_heads, config.head_dim), config.rms_norm_eps},
      keys_values_(from_panel(*config.layer.qkv, shape_.query_width() / kPanel)),
      keys_values_offset_(shape_.query_width() % kPanel),
      pass_(shape_) {}

const char* EagleDraft::check(const EagleArgs& args) const {
  for (int64_t sequence = 0; sequence < args.batch; ++sequence) {
    if (outside(args.slots[sequence], 0, args.memory.num_slots - 1)) return "a slot lies outside the memory";
    if (outside(args.lengths[sequence] - 1, 1, args.memory.num_positions)) return "a length lies outside the memory";
    if (!config_.vocabulary.has(args.root_tokens[sequence])) return "a root token has no embedding";
  }
  return nullptr;
}

const char* EagleDraft::check(const EagleCommitted& committed) const {
  for (int64_t sequence = 0; sequence < committed.batch; ++sequence) {
    const int64_t count = committed.counts[sequence], start = committed.starts[sequence];
    if (outside(committed.slots[sequence], 0, committed.memory.num_slots - 1)) return "a slot lies outside the memory";
    if (outside(count, 0, committed.max_rows)) return "a count lies outside the rows";
    if (outside(start, 0, committed.memory.num_positions - count)) return "a position lies outside the memory";
    for (int64_t row = 0; row < count; ++row)
      if (!config_.vocabulary.has(committed.next_tokens[sequence * committed.max_rows + row]))
        return "a token has no embedding";
  }
  return nullptr;
}

void EagleDraft::prepare(const EagleArgs& args, const Pool& pool) {
  const int64_t width = config_.hidden_size, depths = config_.max_depth, kv_heads = config_.num_kv_heads;
  search_.start(args.limits, args.batch, args.root_tokens, depths, config_.projection->out_features,
                config_.vocabulary.drafted);
  const int64_t rows = search_.max_rows();
  inputs_ = inputs_buffer_.get<float>(rows * 2 * width);
  hidden_ = hidden_buffer_.get<float>(rows * width);
  feature_ = feature_buffer_.get<float>(rows * width);
  cos_ = angles_buffer_.get<float>(rows * config_.head_dim);
  sin_ = cos_ + rows * (config_.head_dim / 2);
  const bool bf16 = args.memory.is_bf16;
  const int64_t step_bytes = kv_heads * depths * rows * config_.head_dim * (bf16 ? 2 : 4);
  char* steps = steps_buffer_.get<char>(2 * step_bytes);
  steps_ = {steps, steps + step_bytes, bf16, 1, depths * rows};
  step_above_ = places_buffer_.get<int32_t>(rows * (2 * depths + 4));
  path_steps_ = step_above_ + rows * depths;
  slots_ = path_steps_ + rows * depths;
  prefix_lengths_ = slots_ + rows;
  num_steps_ = prefix_lengths_ + rows;
  own_steps_ = num_steps_ + rows;
  pass_.reserve(rows, bf16, rows, 2 * width);
  act_ = pass_.activations();
  const int64_t longest = *std::max_element(args.lengths, args.lengths + args.batch) + depths;
  pass_.reserve_partials(rows, longest, pool.num_threads());
}

// Who the paths of this depth are, and what they attend to: the features before the last true one, then their steps.
void EagleDraft::begin_depth(const EagleArgs& args, const Pool& pool, int64_t depth) {
  const int64_t rows = search_.paths().size(), max_rows = search_.max_rows(), depths = config_.max_depth;
  for (int64_t row = 0; row < rows; ++row) {
    const DraftPath& path = search_.paths()[row];
    slots_[row] = static_cast<int32_t>(args.slots[path.sequence]);
    prefix_lengths_[row] = static_cast<int32_t>(args.lengths[path.sequence] - 2);
    num_steps_[row] = static_cast<int32_t>(depth + 1);
    own_steps_[row] = static_cast<int32_t>(depth * max_rows + row);
    step_above_[own_steps_[row]] = static_cast<int32_t>((depth - 1) * max_rows + path.parent);
    int32_t* steps = path_steps_ + row * depths;
    steps[depth] = own_steps_[row];
    for (int64_t place = depth; place > 0; --place) steps[place - 1] = step_above_[steps[place]];
  }
  pass_.plan({rows, cos_, sin_, own_steps_, {slots_, prefix_lengths_, path_steps_, num_steps_, depths}},
             pool.num_threads());
}

// The two inputs of the layer, prepared for its first product, and the angles of the row.
void EagleDraft::write_inputs(const EagleMemory& memory, const Row& from, int64_t row) const {
  const int64_t width = config_.hidden_size, half = config_.head_dim / 2;
  float* x = inputs_ + row * 2 * width;
  rms_norm(from.feature, config_.feature_norm, width, config_.rms_norm_eps, x);
  config_.vocabulary.embed(from.token, width, x + width);
  rms_norm(x + width, config_.embedding_norm, width, config_.rms_norm_eps, x + width);
  prepare_row(config_.fc->kind, x, 2 * width, act_, row);
  std::memcpy(cos_ + row * half, memory.cos + from.position * half, half * sizeof(float));
  std::memcpy(sin_ + row * half, memory.sin + from.position * half, half * sizeof(float));
}

// Of all paths, prepared for the projection.
void EagleDraft::features(const EagleArgs& args, Pool& pool, int64_t depth) {
  const int64_t rows = search_.paths().size(), width = config_.hidden_size;
  pool.for_each(1, [&](int64_t) { begin_depth(args, pool, depth); });
  pool.for_each(rows, [&](int64_t row) {
    const DraftPath& path = search_.paths()[row];
    const float* feature = depth == 0 ? args.hidden + path.sequence * width : feature_ + path.parent * width;
    write_inputs(args.memory, {feature, path.token, slots_[row], prefix_lengths_[row] + depth}, row);
  });
  linear(pool, *config_.fc, act_, rows, hidden_, width, false);
  pass_.run(pool, config_.layer, {args.memory.cache(), steps_}, hidden_);
  pool.for_each(rows, [&](int64_t row) {
    float* feature = feature_ + row * width;
    rms_norm(hidden_ + row * width, config_.norm, width, config_.rms_norm_eps, feature);
    prepare_row(config_.projection->kind, feature, width, act_, row);
  });
}

void EagleDraft::draft(const EagleArgs& args) {
  if (args.batch == 0) return;
  Pool& pool = Pool::instance();
  prepare(args, pool);
  pool.run([&] {
    for (int64_t depth = 0; !search_.paths().empty(); ++depth) {
      features(args, pool, depth);
      search_.descend(pool, *config_.projection, act_, depth + 1 == config_.max_depth);
    }
    search_.finish(pool, args.out);
  });
}

void EagleDraft::observe(const EagleCommitted& committed) {
  observed_.clear();
  for (int64_t sequence = 0; sequence < committed.batch; ++sequence)
    for (int64_t row = 0; row < committed.counts[sequence]; ++row) {
      const int64_t at = sequence * committed.max_rows + row;
      observed_.push_back({committed.hidden + at * config_.hidden_size, committed.next_tokens[at],
                           committed.slots[sequence], committed.starts[sequence] + row});
    }
  const int64_t count = observed_.size(), together = std::min(count, kObservedRows);
  inputs_ = inputs_buffer_.get<float>(together * 2 * config_.hidden_size);
  hidden_ = hidden_buffer_.get<float>(together * config_.hidden_size);
  wide_ = wide_buffer_.get<float>(together * keys_values_.out_features);
  cos_ = angles_buffer_.get<float>(together * config_.head_dim);
  sin_ = cos_ + together * (config_.head_dim / 2);
  act_ = act_buffer_.get(together, 2 * config_.hidden_size);
  const int64_t products = config_.hidden_size * (2 * config_.hidden_size + keys_values_.out_features);
  Pool& pool = std::max(count, kFreeRows) * products <= kSerialProducts ? alone_ : Pool::instance();
  pool.run([&] {
    for (int64_t first = 0; first < count; first += kObservedRows)
      remember(pool, committed.memory, observed_.data() + first, std::min(kObservedRows, count - first));
  });
}

void EagleDraft::remember(Pool& pool, const EagleMemory& memory, const Row* rows, int64_t count) const {
  const int64_t width = config_.hidden_size, half = config_.head_dim / 2;
  pool.for_each(count, [&](int64_t i) { write_inputs(memory, rows[i], i); });
  linear(pool, *config_.fc, act_, count, hidden_, width, false);
  pool.for_each(count, [&](int64_t i) {
    float* x = hidden_ + i * width;
    rms_norm(x, config_.layer.input_norm, width, config_.rms_norm_eps, x);
    prepare_row(keys_values_.kind, x, width, act_, i);
  });
  linear(pool, keys_values_, act_, count, wide_, keys_values_.out_features, false);
  pool.for_each(count, [&](int64_t i) {
    write_keys_values(shape_, config_.layer, wide_ + i * keys_values_.out_features + keys_values_offset_,
                      cos_ + i * half, sin_ + i * half, memory.cache(), rows[i].slot, rows[i].position);
  });
}

}  // namespace gorgon

#define GORGON_API extern "C" __attribute__((visibility("default")))

GORGON_API gorgon::EagleDraft* gorgon_eagle_create(const gorgon::EagleConfig* config) {
  try {
    return new gorgon::EagleDraft(*config);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

GORGON_API void gorgon_eagle_destroy(gorgon::EagleDraft* draft) { delete draft; }

// Null, or what is wrong with the call.
GORGON_API const char* gorgon_eagle_draft(gorgon::EagleDraft* draft, const gorgon::EagleArgs* args) {
  try {
    if (const char* problem = draft->check(*args)) return problem;
    draft->draft(*args);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}

// Null, or what is wrong with the call.
GORGON_API const char* gorgon_eagle_observe(gorgon::EagleDraft* draft, const gorgon::EagleCommitted* committed) {
  try {
    if (const char* problem = draft->check(*committed)) return problem;
    draft->observe(*committed);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}
