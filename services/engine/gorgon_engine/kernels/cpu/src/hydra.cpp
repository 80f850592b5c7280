#include "hydra.h"

#include <cstring>
#include <new>

#include "elementwise.h"

namespace gorgon {

HydraDraft::HydraDraft(const HydraConfig& config)
    : config_(config), heads_(config.heads, config.heads + config.num_heads) {
  for (const HydraHead& head : heads_) blocks_.insert(blocks_.end(), head.blocks, head.blocks + config.num_blocks);
  for (int64_t depth = 0; depth < config.num_heads; ++depth)
    heads_[depth].blocks = blocks_.data() + depth * config.num_blocks;
  config_.heads = heads_.data();
}

const char* HydraDraft::check(const HydraArgs& args) const {
  for (int64_t sequence = 0; sequence < args.batch; ++sequence)
    if (!config_.vocabulary.has(args.root_tokens[sequence])) return "a root token has no embedding";
  return nullptr;
}

void HydraDraft::prepare(const HydraArgs& args) {
  const int64_t width = config_.hidden_size, widest = (1 + config_.num_heads) * width;
  search_.start(args.limits, args.batch, args.root_tokens, config_.num_heads, heads_[0].projection->out_features,
                config_.vocabulary.drafted);
  const int64_t rows = search_.max_rows();
  conditions_ = conditions_buffer_.get<float>(2 * rows * widest);
  inner_ = inner_buffer_.get<float>(rows * width);
  feature_ = feature_buffer_.get<float>(rows * width);
  act_ = act_buffer_.get(rows, widest);
}

// What head `depth` (here from 0) reads for a path: [hidden, e(t_1), ..., e(t_(depth + 1))].
float* HydraDraft::condition(int64_t depth, int64_t row) const {
  return conditions_ + (depth % 2 * search_.max_rows() + row) * (1 + config_.num_heads) * config_.hidden_size;
}

void HydraDraft::write_condition(const HydraArgs& args, int64_t depth, int64_t row) const {
  const int64_t width = config_.hidden_size;
  const DraftPath& path = search_.paths()[row];
  float* out = condition(depth, row);
  float* last = out + (1 + depth) * width;
  if (depth > 0) {
    std::memcpy(out, condition(depth - 1, path.parent), (1 + depth) * width * sizeof(float));
  } else {
    std::memcpy(out, args.hidden + path.sequence * width, width * sizeof(float));
    if (config_.norm) rms_norm(out, nullptr, width, config_.rms_norm_eps, out);
  }
  config_.vocabulary.embed(path.token, width, last);
  if (config_.norm) rms_norm(last, nullptr, width, config_.rms_norm_eps, last);
}

// Of all paths, prepared for the head's projection.
void HydraDraft::features(const HydraArgs& args, Pool& pool, int64_t depth) const {
  const HydraHead& head = heads_[depth];
  const int64_t rows = search_.paths().size(), width = config_.hidden_size, num_blocks = config_.num_blocks;
  pool.for_each(rows, [&](int64_t row) {
    write_condition(args, depth, row);
    prepare_row(head.input->kind, condition(depth, row), (2 + depth) * width, act_, row);
  });
  linear(pool, *head.input, act_, rows, inner_, width, false);
  if (head.residual) linear(pool, *head.residual, act_, rows, feature_, width, false);
  for (int64_t block = 0; block <= num_blocks; ++block) {
    if (block > 0) linear(pool, *head.blocks[block - 1], act_, rows, inner_, width, false);
    pool.for_each(rows, [&](int64_t row) {
      float* x = feature_ + row * width;
      add_silu(inner_ + row * width, block == 0 && !head.residual ? condition(depth, row) : x, width, x);
      if (block == num_blocks && config_.norm) rms_norm(x, config_.norm, width, config_.rms_norm_eps, x);
      prepare_row((block < num_blocks ? head.blocks[block] : head.projection)->kind, x, width, act_, row);
    });
  }
}

void HydraDraft::draft(const HydraArgs& args) {
  if (args.batch == 0) return;
  prepare(args);
  Pool& pool = Pool::instance();
  pool.run([&] {
    for (int64_t depth = 0; !search_.paths().empty(); ++depth) {
      features(args, pool, depth);
      search_.descend(pool, *heads_[depth].projection, act_, depth + 1 == config_.num_heads);
    }
    search_.finish(pool, args.out);
  });
}

}  // namespace gorgon

#define GORGON_API extern "C" __attribute__((visibility("default")))

GORGON_API gorgon::HydraDraft* gorgon_hydra_create(const gorgon::HydraConfig* config) {
  try {
    return new gorgon::HydraDraft(*config);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

GORGON_API void gorgon_hydra_destroy(gorgon::HydraDraft* draft) { delete draft; }

// Null, or what is wrong with the call.
GORGON_API const char* gorgon_hydra_draft(gorgon::HydraDraft* draft, const gorgon::HydraArgs* args) {
  try {
    if (const char* problem = draft->check(*args)) return problem;
    draft->draft(*args);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}
