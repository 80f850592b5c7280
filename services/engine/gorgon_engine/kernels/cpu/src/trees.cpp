// Merging drafters' guesses and laying the tree out breadth-first. gorgon_engine/tree/tree.py says the same in tensor
// operations; the results are equal to the bit, padding included.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <new>
#include <vector>

#include "ordering.h"

namespace gorgon {
namespace {

constexpr char kBadParent[] = "a parent does not come before its child";

struct Forest {
  const int64_t* tokens;  // [batch, count], as all that follows
  const int64_t* parents;
  const float* log_probs;
  const int64_t* ranks;
  const int64_t* draft_rows;  // may be null
  int64_t count;
};

struct MergeArgs {
  const Forest* forests;
  int64_t num_forests, batch, max_depth, keep;
  int64_t* tokens;  // [batch, keep], as all that follows
  int64_t* parents;
  float* log_probs;
  int64_t* ranks;
  int64_t* sources;
  int64_t* draft_rows;  // null where the forests have none
};

struct FlattenArgs {
  int64_t batch, stride, columns, words;  // stride: columns that there are, columns: that are looked at
  const int64_t* root_tokens;             // [batch]
  const int64_t* num_nodes;               // [batch]
  const int64_t* tokens;                  // [batch, stride], as all that follows
  const int64_t* parents;
  const float* log_probs;
  const int64_t* ranks;
  const int64_t* sources;
  const int64_t* draft_rows;  // may be null
  int64_t* out_tokens;        // [batch, columns + 1], as all that follows
  int64_t* out_parents;
  int64_t* out_depths;
  int64_t* out_ancestors;  // [batch, columns + 1, words]
  float* out_log_probs;
  int64_t* out_ranks;
  int64_t* out_sources;
  int64_t* out_num_nodes;   // [batch]
  int64_t* out_draft_rows;  // null where draft_rows is
};

// One candidate of one sequence.
struct Candidate {
  int64_t token, parent, rank, source, draft_row;  // parent: index into the candidates of all forests, -1 = the root
  uint64_t path_key;                               // hash of the tokens from the root
  int64_t depth;                                   // 1 below the root
  float log_prob;                                  // -inf: padding
  int64_t first;                                   // the first real candidate of the same path; their number if none
};

// The polynomial hash of tree.py's _hash_paths: odd 64-bit constants of splitmix64.
constexpr uint64_t kMix = 0x9E3779B97F4A7C15u;
constexpr uint64_t kBase = 0xBF58476D1CE4E5B9u;

uint64_t token_hash(int64_t token) {
  const uint64_t product = (static_cast<uint64_t>(token) + 1u) * kMix;
  return product ^ static_cast<uint64_t>(static_cast<int64_t>(product) >> 29);
}

// Open addressing: path key -> first candidate.
class PathTable {
 public:
  void reset(size_t count) {
    size_t size = 8;
    while (size < 2 * count) size *= 2;
    slots_.assign(size, -1);
  }
  // The slot of the key, or the empty one where it belongs.
  int64_t& find(uint64_t key, const std::vector<Candidate>& candidates) {
    size_t slot = key >> 32;
    for (;; ++slot) {
      int64_t& index = slots_[slot & (slots_.size() - 1)];
      if (index < 0 || candidates[index].path_key == key) return index;
    }
  }

 private:
  std::vector<int64_t> slots_;
};

struct MergeScratch {
  std::vector<Candidate> candidates;
  std::vector<float> joined;
  std::vector<uint64_t> order;
  std::vector<int64_t> place;
  PathTable table;
};

bool read_candidates(const MergeArgs& a, int64_t row, std::vector<Candidate>& out) {
  out.clear();
  for (int64_t f = 0; f < a.num_forests; ++f) {
    const Forest& forest = a.forests[f];
    const int64_t offset = static_cast<int64_t>(out.size());
    for (int64_t i = row * forest.count; i < (row + 1) * forest.count; ++i) {
      Candidate c{};
      c.token = forest.tokens[i];
      c.parent = forest.parents[i] < 0 ? -1 : forest.parents[i] + offset;
      c.rank = forest.ranks[i];
      c.source = f;
      c.draft_row = forest.draft_rows ? forest.draft_rows[i] : 0;
      if (c.parent >= static_cast<int64_t>(out.size())) return false;
      const Candidate* parent = c.parent < 0 ? nullptr : &out[c.parent];
      c.path_key = token_hash(c.token) + (parent ? kBase * parent->path_key : 0);
      c.depth = 1 + (parent ? parent->depth : 0);
      // A NaN is padding too.
      c.log_prob = forest.log_probs[i] > -INFINITY && c.depth <= a.max_depth ? forest.log_probs[i] : -INFINITY;
      out.push_back(c);
    }
  }
  return true;
}

// The first candidate of each path and, there only, the best log-probability of all with that path.
void join(MergeScratch& s) {
  const int64_t count = static_cast<int64_t>(s.candidates.size());
  s.joined.assign(count, -INFINITY);
  s.table.reset(count);
  for (int64_t i = 0; i < count; ++i) {
    const Candidate& c = s.candidates[i];
    if (c.log_prob == -INFINITY) continue;
    int64_t& first = s.table.find(c.path_key, s.candidates);
    if (first < 0) first = i;
    s.joined[first] = std::max(s.joined[first], c.log_prob);
  }
  for (Candidate& c : s.candidates) {
    const int64_t first = s.table.find(c.path_key, s.candidates);
    c.first = first < 0 ? count : first;
  }
}

bool merge_row(const MergeArgs& a, int64_t row, MergeScratch& s) {
  if (!read_candidates(a, row, s.candidates)) return false;
  join(s);
  const int64_t count = static_cast<int64_t>(s.candidates.size());
  s.order.resize(count);
  for (int64_t i = 0; i < count; ++i) s.order[i] = key_of(s.joined[i], i);
  // A parent precedes its children in the input, so it does among equals in the output.
  std::sort(s.order.begin(), s.order.end(), std::greater<>());
  s.place.assign(count, a.keep);
  for (int64_t i = 0; i < a.keep; ++i) s.place[index_of(s.order[i])] = i;
  for (int64_t i = 0; i < a.keep; ++i) {
    const int64_t index = index_of(s.order[i]), out = row * a.keep + i;
    const Candidate& c = s.candidates[index];
    a.tokens[out] = c.token;
    // A duplicate's children hang below the copy that was kept.
    a.parents[out] = c.parent < 0 ? -1 : s.place[std::min(s.candidates[c.parent].first, count - 1)];
    a.log_probs[out] = s.joined[index];
    a.ranks[out] = c.rank;
    a.sources[out] = c.source;
    if (a.draft_rows) a.draft_rows[out] = c.draft_row;
  }
  return true;
}

struct FlattenScratch {
  std::vector<int64_t> parents, depths, starts, order, place;
};

// The tree's parents and depths before it is laid out, and the layout: breadth-first, padding last, best first within a
// depth (a counting sort). False for a parent that does not come before its child.
bool plan_row(const FlattenArgs& a, int64_t row, FlattenScratch& s) {
  const int64_t num_nodes = a.columns + 1, padding = a.columns + 1;
  s.parents.assign(num_nodes, -1);
  s.depths.assign(num_nodes, 0);
  s.starts.assign(num_nodes + 2, 0);
  s.order.resize(num_nodes);
  s.place.resize(num_nodes);
  int64_t num_real = 1;
  s.place[0] = 0;  // the level of each node until its place is known
  s.starts[1] = 1;
  for (int64_t n = 1; n < num_nodes; ++n) {
    const int64_t in = row * a.stride + n - 1;
    const bool real = a.log_probs[in] > -INFINITY && n < a.num_nodes[row];
    if (real) {
      const int64_t parent = a.parents[in] + 1;
      if (parent >= n) return false;
      s.parents[n] = parent < 0 ? -1 : parent;
      s.depths[n] = parent < 0 ? 0 : s.depths[parent] + 1;
      ++num_real;
    }
    s.place[n] = real ? s.depths[n] : padding;
    ++s.starts[s.place[n] + 1];
  }
  a.out_num_nodes[row] = num_real;
  for (int64_t level = 0; level <= padding; ++level) s.starts[level + 1] += s.starts[level];
  for (int64_t n = 0; n < num_nodes; ++n) {
    s.place[n] = s.starts[s.place[n]]++;
    s.order[s.place[n]] = n;
  }
  return true;
}

void write_node(const FlattenArgs& a, int64_t row, int64_t place, const FlattenScratch& s) {
  const int64_t node = s.order[place], first = row * (a.columns + 1), out = first + place;
  const int64_t in = row * a.stride + node - 1;
  const int64_t parent = s.parents[node] < 0 ? -1 : s.place[s.parents[node]];
  const bool root = node == 0;
  a.out_tokens[out] = root ? a.root_tokens[row] : a.tokens[in];
  a.out_parents[out] = parent;
  a.out_depths[out] = s.depths[node];
  a.out_log_probs[out] = root ? 0.0f : a.log_probs[in];
  a.out_ranks[out] = root ? 0 : a.ranks[in];
  a.out_sources[out] = root ? 0 : a.sources[in];
  if (a.draft_rows) a.out_draft_rows[out] = root ? 0 : a.draft_rows[in];
  uint64_t* words = reinterpret_cast<uint64_t*>(a.out_ancestors);
  for (int64_t w = 0; w < a.words; ++w) {
    const uint64_t above = parent < 0 ? 0 : words[(first + parent) * a.words + w];
    words[out * a.words + w] = above | (w == place / 64 ? uint64_t{1} << (place % 64) : 0);
  }
}

}  // namespace
}  // namespace gorgon

#define GORGON_API extern "C" __attribute__((visibility("default")))

// Both: null, or what is wrong with the call.
GORGON_API const char* gorgon_merge_candidates(const gorgon::MergeArgs* args) {
  static thread_local gorgon::MergeScratch scratch;
  try {
    for (int64_t row = 0; row < args->batch; ++row)
      if (!gorgon::merge_row(*args, row, scratch)) return gorgon::kBadParent;
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}

GORGON_API const char* gorgon_flatten(const gorgon::FlattenArgs* args) {
  static thread_local gorgon::FlattenScratch scratch;
  try {
    for (int64_t row = 0; row < args->batch; ++row) {
      if (!gorgon::plan_row(*args, row, scratch)) return gorgon::kBadParent;
      for (int64_t place = 0; place <= args->columns; ++place) gorgon::write_node(*args, row, place, scratch);
    }
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}
