// The search for a drafter's likeliest paths below a root, depth by depth (EAGLE-2, 2406.16858, section 4).
//
// The drafter gives features of the paths that are looked below; their projection to the vocabulary, the choice of the
// likeliest tokens, the beam of the next depth and the tree at the end are here. drafters/beam.py says the same in
// tensor operations. A sequence's result depends on that sequence only, to the bit, whatever the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "linear.h"
#include "pool.h"
#include "top_log_probs.h"

namespace gorgon {

struct SearchLimits {
  int64_t num_choices;  // tokens that a path proposes, at most the vocabulary
  int64_t width;        // paths of a sequence that go on to the next depth
  int64_t max_nodes;    // of a sequence's tree, and of each depth on the way
  float min_path_prob;  // less likely paths do not go on
};

// A path that is looked below at the present depth: one row of features.
struct DraftPath {
  int64_t sequence;
  int64_t parent;  // its row at the depth above; none at the first depth
  int64_t token;   // its last one
  int64_t node;    // of that token, among all of the sequence; -1 = the root
  float log_prob;
};

// [batch, max_nodes] each: parents before children, best first, padded with log-probability -inf.
struct DraftTrees {
  int64_t* tokens;
  int64_t* parents;  // -1 = child of the root
  float* log_probs;
  int64_t* ranks;
};

class DraftSearch {
 public:
  // A new search below roots [batch], with all memory that it will need (throws std::bad_alloc). vocabulary: the token
  // of each of the `vocab` columns of a projection; null = the column itself.
  void start(const SearchLimits& limits, int64_t batch, const int64_t* roots, int64_t max_depth, int64_t vocab,
             const int64_t* vocabulary);

  int64_t max_rows() const { return max_rows_; }
  // By sequence, best first; none: the search is over.
  const std::vector<DraftPath>& paths() const { return paths_; }

  // Inside Pool::run(): from features of paths(), prepared for `projection`, to the paths of the next depth; last: to
  // none.
  void descend(Pool& pool, const PackedMatrix& projection, const Activations& features, bool last);
  void finish(Pool& pool, const DraftTrees& out);

 private:
  struct Node {
    int64_t token, parent, rank;  // parent: among all nodes of the sequence
    float log_prob;
  };

  void project(Pool& pool, const PackedMatrix& projection, const Activations& features) const;
  void next_depth(bool last);
  void add_nodes(int64_t first, int64_t end, bool last);
  void write_tree(int64_t sequence, const DraftTrees& out) const;

  SearchLimits limits_{};
  int64_t batch_ = 0, max_rows_ = 0, vocab_ = 0, node_stride_ = 0;
  const int64_t* vocabulary_ = nullptr;
  TopLogProbs top_;
  std::vector<DraftPath> paths_, next_;
  std::vector<int64_t> num_nodes_;  // [batch]
  Buffer statistics_, logits_buffer_, log_probs_buffer_, ids_buffer_, nodes_buffer_, keys_buffer_, places_buffer_;
  float* logits_ = nullptr;     // [max_rows, vocab]
  float* log_probs_ = nullptr;  // [max_rows, num_choices]
  int64_t* ids_ = nullptr;      // [max_rows, num_choices]
  Node* nodes_ = nullptr;       // [batch, node_stride]
  uint64_t* keys_ = nullptr;    // [batch, node_stride]
  int64_t* places_ = nullptr;   // [batch, node_stride], of each node in the tree
};

}  // namespace gorgon
