#include "attention.h"

#include <algorithm>
#include <limits>

#include "attention_blocks.h"

namespace gorgon {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Queries (rows of a group x query heads of a kv head) whose scores and sums stay in L1/L2 beside one block.
constexpr int64_t kMaxQueries = 24;
constexpr int kBlocksPerChunk = kChunk / kBlock;
// Fewer items a thread are cut into chunks, so that no thread waits long for another's last one.
constexpr int64_t kSplitItems = 8;

// Working memory of one thread.
struct Scratch {
  BlockScratch block;
  std::vector<float> scores;      // [queries, kChunk]
  std::vector<uint32_t> weights;  // [queries, kChunk] fp32 or bf16
  std::vector<float> sums;        // [queries, partial_stride]: maximum, sum, -, weighted values from 16 on
  std::vector<float> merged;      // as sums
  void reserve(int64_t queries, int64_t stride) {
    if (scores.size() < static_cast<size_t>(queries * kChunk)) {
      scores.resize(queries * kChunk);
      weights.resize(queries * kChunk);
    }
    if (sums.size() < static_cast<size_t>(queries * stride)) {
      sums.resize(queries * stride);
      merged.resize(queries * stride);
    }
  }
};

// A partial result: [0] maximum, [1] sum of weights, [16..] weighted values. state = state (+) next, in this order.
void merge_partial(float* state, const float* next, int64_t padded_dim) {
  if (next[0] == kMinusInfinity) return;
  if (state[0] == kMinusInfinity) {
    std::copy(next, next + 16 + padded_dim, state);
    return;
  }
  const float top = std::max(state[0], next[0]);
  const F16 keep = exp(set1(state[0] - top));
  const F16 add = exp(set1(next[0] - top));
  alignas(64) float lanes[kLanes];
  store(lanes, set1(state[1]) * keep + set1(next[1]) * add);
  state[0] = top;
  state[1] = lanes[0];
  for (int64_t d = 16; d < 16 + padded_dim; d += kLanes)
    store(state + d, load(state + d) * keep + load(next + d) * add);
}

void write_output(const float* state, int64_t head_dim, float* out) {
  const F16 total = set1(state[1] > 0.0f ? state[1] : 1.0f);
  for (int64_t d = 0; d < head_dim; d += kLanes)
    store_n(out + d, load(state + 16 + d) / total, static_cast<int>(std::min<int64_t>(head_dim - d, kLanes)));
}

void clear_partial(float* state, int64_t padded_dim) {
  std::fill(state, state + 16 + padded_dim, 0.0f);
  state[0] = kMinusInfinity;
}

// function(length, first) over runs of at most Longest that cover [first, first + count); the length is a constant.
template <int Longest, typename Function>
void in_runs(int64_t first, int64_t count, Function&& function) {
  for (; count >= Longest; count -= Longest, first += Longest)
    function(std::integral_constant<int, Longest>{}, first);
  unrolled<Longest>([&](auto length) {
    if constexpr (length > 0)
      if (length == count) function(length, first);
  });
}

// The rows of one group against one kv head.
template <typename Cache>
class Item {
 public:
  Item(const AttentionArgs& args, int64_t first_row, int64_t last_row, int64_t kv_head, Scratch& scratch)
      : a_(args), s_(scratch), first_(first_row), last_(last_row), kv_head_(kv_head) {
    const AttentionShape& shape = args.shape;
    heads_ = shape.num_heads / shape.num_kv_heads;
    words_ = shape.head_dim / Cache::kPerWord;
    query_stride_ = shape.padded_dim / Cache::kPerWord;
    stride_ = partial_stride(shape);
    const int64_t slot = args.keys.slots[first_row];
    const int64_t offset = (slot * shape.num_kv_heads + kv_head) * args.cache.num_positions * shape.head_dim;
    keys_ = static_cast<const Element*>(args.cache.keys) + offset;
    values_ = static_cast<const Element*>(args.cache.values) + offset;
    const int64_t tree_offset = kv_head * args.tree.num_positions * shape.head_dim;
    tree_keys_ = args.tree.keys ? static_cast<const Element*>(args.tree.keys) + tree_offset : keys_;
    tree_values_ = args.tree.keys ? static_cast<const Element*>(args.tree.values) + tree_offset : values_;
    scratch.reserve((last_row - first_row) * heads_, stride_);
  }

  // Fills sums with the partial result of the chunk's keys, for every row and head.
  void chunk(int64_t chunk) {
    const int64_t base = chunk * kChunk;
    const int64_t queries = (last_ - first_) * heads_;
    for (int64_t q = 0; q < queries; ++q) clear_partial(sums(q), a_.shape.padded_dim);

    int64_t shared_begin = 0, shared_end = kBlocksPerChunk;
    for (int64_t row = first_; row < last_; ++row) {
      shared_begin = std::max(shared_begin, ceil_block(start(row) - base));
      shared_end = std::min(shared_end, (std::max<int64_t>(a_.keys.prefix_lengths[row] - base, 0)) / kBlock);
    }
    shared_end = std::max(shared_begin, shared_end);

    for (int64_t block = shared_begin; block < shared_end; ++block) {
      contiguous(keys_, base + block * kBlock);
      load_keys(pointers_, words_, s_.block.keys);
      scores(0, queries, block);
    }
    for (int64_t row = first_; row < last_; ++row)
      own_blocks(row, base, shared_begin, shared_end, [&](int64_t block) {
        gather(keys_, tree_keys_, row, base + block * kBlock);
        load_keys(pointers_, words_, s_.block.keys);
        scores((row - first_) * heads_, heads_, block);
        mask(row, base, block);
      });
    for (int64_t row = first_; row < last_; ++row) {
      const int64_t begin = block_begin(row, base), end = block_end(row, base);
      if (begin >= end) continue;
      for (int64_t h = 0; h < heads_; ++h) softmax((row - first_) * heads_ + h, begin, end);
    }
    // Ascending for every row: its own blocks before the shared ones, the shared ones, its own after them.
    for (int64_t row = first_; row < last_; ++row) own_values(row, base, block_begin(row, base), shared_begin);
    for (int64_t block = shared_begin; block < shared_end; ++block) {
      contiguous(values_, base + block * kBlock);
      Cache::load_values(pointers_, a_.shape.head_dim, a_.shape.padded_dim, s_.block.values);
      values(0, queries, block);
    }
    for (int64_t row = first_; row < last_; ++row)
      own_values(row, base, std::max(shared_end, block_begin(row, base)), block_end(row, base));
  }

  int64_t heads() const { return heads_; }
  float* sums(int64_t query) { return s_.sums.data() + query * stride_; }
  float* merged(int64_t query) { return s_.merged.data() + query * stride_; }

 private:
  using Element = typename Cache::Element;

  static int64_t ceil_block(int64_t keys) { return keys <= 0 ? 0 : (keys + kBlock - 1) / kBlock; }
  int64_t start(int64_t row) const {
    return a_.window > 0 ? std::max<int64_t>(0, a_.keys.length(row) - a_.window) : 0;
  }
  int64_t block_begin(int64_t row, int64_t base) const { return std::max<int64_t>(0, start(row) - base) / kBlock; }
  int64_t block_end(int64_t row, int64_t base) const {
    return std::min<int64_t>(kBlocksPerChunk, ceil_block(a_.keys.length(row) - base));
  }

  template <typename Function>
  void own_blocks(int64_t row, int64_t base, int64_t shared_begin, int64_t shared_end, Function&& function) {
    const int64_t end = block_end(row, base);
    for (int64_t block = block_begin(row, base); block < std::min(shared_begin, end); ++block) function(block);
    for (int64_t block = std::max(shared_end, block_begin(row, base)); block < end; ++block) function(block);
  }

  void own_values(int64_t row, int64_t base, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < std::min(end, block_end(row, base)); ++block) {
      gather(values_, tree_values_, row, base + block * kBlock);
      Cache::load_values(pointers_, a_.shape.head_dim, a_.shape.padded_dim, s_.block.values);
      values((row - first_) * heads_, heads_, block);
    }
  }

  void contiguous(const Element* from, int64_t index) {
    for (int i = 0; i < kBlock; ++i) pointers_[i] = from + (index + i) * a_.shape.head_dim;
  }

  void gather(const Element* prefix_from, const Element* tree_from, int64_t row, int64_t index) {
    const int64_t prefix = a_.keys.prefix_lengths[row], length = a_.keys.length(row), begin = start(row);
    const int32_t* tree = a_.keys.tree_positions + row * a_.keys.tree_stride;
    for (int i = 0; i < kBlock; ++i) {
      const int64_t key = index + i;
      if (key < begin || key >= length) pointers_[i] = nullptr;
      else if (key < prefix) pointers_[i] = prefix_from + key * a_.shape.head_dim;
      else pointers_[i] = tree_from + tree[key - prefix] * a_.shape.head_dim;
    }
  }

  void mask(int64_t row, int64_t base, int64_t block) {
    const int64_t begin = start(row), length = a_.keys.length(row);
    for (int64_t h = 0; h < heads_; ++h) {
      float* block_scores = score(row_query(row) + h, block);
      for (int i = 0; i < kBlock; ++i) {
        const int64_t key = base + block * kBlock + i;
        if (key < begin || key >= length) block_scores[i] = kMinusInfinity;
      }
    }
  }

  void scores(int64_t query, int64_t count, int64_t block) {
    // The queries of one kv head lie together over all rows. Eight at a time hide the latency of their sums.
    const int64_t first = (kv_head_ * a_.num_rows + first_) * heads_;
    const uint32_t* queries = static_cast<const uint32_t*>(a_.queries) + first * query_stride_;
    in_runs<8>(query, count, [&](auto run, int64_t q) {
      score_block<Cache, run>(queries + q * query_stride_, query_stride_, words_, s_.block.keys, score(q, block),
                              kChunk);
    });
  }

  void softmax(int64_t query, int64_t begin, int64_t end) {
    float* from = score(query, 0);
    F16 top = set1(kMinusInfinity);
    for (int64_t block = begin; block < end; ++block) top = max(top, load(from + block * kBlock));
    const float maximum = reduce_max(top);
    F16 total = set1(0.0f);
    for (int64_t block = begin; block < end; ++block) {
      // The sum takes the weights as they will be used, so that they add up to one after rounding too.
      const F16 weight = Cache::rounded(exp(load(from + block * kBlock) - set1(maximum)));
      total = total + weight;
      Cache::store_weights(weights(query), block * kBlock, weight);
    }
    sums(query)[0] = maximum;
    sums(query)[1] = reduce_add(total);
  }

  void values(int64_t query, int64_t count, int64_t block) {
    in_runs<4>(query, count, [&](auto run, int64_t q) {
      value_dims<run>(weights(q) + block * Cache::kKeySteps, sums(q) + 16);
    });
  }

  template <int Count>
  void value_dims(const uint32_t* from, float* to) {
    const int64_t padded = a_.shape.padded_dim;
    int64_t d = 0;
    for (; d + 4 * kLanes <= padded; d += 4 * kLanes)
      value_block<Cache, Count, 4>(from, kChunk, s_.block.values + d, padded, to + d, stride_);
    for (; d < padded; d += kLanes)
      value_block<Cache, Count, 1>(from, kChunk, s_.block.values + d, padded, to + d, stride_);
  }

  int64_t row_query(int64_t row) const { return (row - first_) * heads_; }
  float* score(int64_t query, int64_t block) { return s_.scores.data() + query * kChunk + block * kBlock; }
  uint32_t* weights(int64_t query) { return s_.weights.data() + query * kChunk; }

  const AttentionArgs& a_;
  Scratch& s_;
  int64_t first_, last_, kv_head_, heads_, words_, query_stride_, stride_;
  const Element* keys_;
  const Element* values_;
  const Element* tree_keys_;
  const Element* tree_values_;
  const void* pointers_[kBlock];
};

template <typename Cache>
void run_item(const AttentionArgs& args, const AttentionPlan& plan, int64_t group, int64_t kv_head, int64_t chunk) {
  static thread_local Scratch scratch;
  const int64_t first = plan.group_starts[group], last = plan.group_starts[group + 1];
  const AttentionShape& shape = args.shape;
  Item<Cache> item(args, first, last, kv_head, scratch);
  const int64_t queries = (last - first) * item.heads(), stride = partial_stride(shape);
  const auto head_index = [&](int64_t q) {
    return (first + q / item.heads()) * shape.num_heads + kv_head * item.heads() + q % item.heads();
  };
  if (plan.split_chunks) {
    item.chunk(chunk);
    for (int64_t q = 0; q < queries; ++q)
      std::copy(item.sums(q), item.sums(q) + stride,
                args.partials + (head_index(q) * plan.num_chunks + chunk) * stride);
    return;
  }
  int64_t longest = 0;
  for (int64_t row = first; row < last; ++row) longest = std::max(longest, args.keys.length(row));
  for (int64_t q = 0; q < queries; ++q) clear_partial(item.merged(q), shape.padded_dim);
  for (int64_t c = 0; c * kChunk < longest; ++c) {
    item.chunk(c);
    for (int64_t q = 0; q < queries; ++q) merge_partial(item.merged(q), item.sums(q), shape.padded_dim);
  }
  for (int64_t q = 0; q < queries; ++q)
    write_output(item.merged(q), shape.head_dim, args.out + head_index(q) * shape.head_dim);
}

}  // namespace

void AttentionPlan::build(const AttentionShape& shape, const RowKeys& keys, int64_t rows, int threads) {
  const int64_t heads = shape.num_heads / shape.num_kv_heads;
  int64_t limit = std::max<int64_t>(1, kMaxQueries / heads);
  int64_t longest = 1;
  for (int64_t row = 0; row < rows; ++row) longest = std::max(longest, keys.length(row));
  num_chunks = (longest + kChunk - 1) / kChunk;
  // Sharing a transposed block is worth more than a perfect balance, but not than an idle thread.
  while (limit > 2 && (rows + limit - 1) / limit * shape.num_kv_heads * num_chunks < 2 * threads) limit /= 2;
  group_starts.clear();
  for (int64_t row = 0; row < rows; ++row)
    if (row == 0 || row - group_starts.back() == limit || keys.slots[row] != keys.slots[row - 1])
      group_starts.push_back(row);
  group_starts.push_back(rows);
  const int64_t items = (static_cast<int64_t>(group_starts.size()) - 1) * shape.num_kv_heads;
  split_chunks = num_chunks > 1 && items < kSplitItems * threads;
}

int64_t AttentionPlan::max_partials(const AttentionShape& shape, int64_t rows, int64_t keys, int threads) {
  const int64_t limit = std::max<int64_t>(1, kMaxQueries / (shape.num_heads / shape.num_kv_heads));
  const int64_t split_rows = std::min(rows, limit * kSplitItems * threads / shape.num_kv_heads);
  return split_rows * shape.num_heads * ((keys + kChunk - 1) / kChunk) * partial_stride(shape);
}

void attention(Pool& pool, const AttentionArgs& args, const AttentionPlan& plan) {
  const int64_t kv_heads = args.shape.num_kv_heads;
  const int64_t chunks = plan.split_chunks ? plan.num_chunks : 1;
  const int64_t groups = static_cast<int64_t>(plan.group_starts.size()) - 1;
  pool.for_each(groups * kv_heads * chunks, [&](int64_t item) {
    // Last groups first: the rows of a prefill grow longer, and the longest items should not be left for the end.
    const int64_t group = groups - 1 - item / (kv_heads * chunks);
    const int64_t kv_head = item / chunks % kv_heads;
    if (args.cache.bf16) run_item<Bf16Cache>(args, plan, group, kv_head, item % chunks);
    else run_item<Fp32Cache>(args, plan, group, kv_head, item % chunks);
  });
}

void attention_merge_row(const AttentionArgs& args, const AttentionPlan& plan, int64_t row) {
  if (!plan.split_chunks) return;
  const AttentionShape& shape = args.shape;
  const int64_t stride = partial_stride(shape);
  for (int64_t head = row * shape.num_heads; head < (row + 1) * shape.num_heads; ++head) {
    float* partials = args.partials + head * plan.num_chunks * stride;
    for (int64_t c = 1; c < plan.num_chunks; ++c) merge_partial(partials, partials + c * stride, shape.padded_dim);
    write_output(partials, shape.head_dim, args.out + head * shape.head_dim);
  }
}

}  // namespace gorgon
