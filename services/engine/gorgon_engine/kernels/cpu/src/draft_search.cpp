#include "draft_search.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "ordering.h"

namespace gorgon {

static_assert(kLogitChunk % kPanel == 0, "a chunk is whole panels");

void DraftSearch::start(const SearchLimits& limits, int64_t batch, const int64_t* roots, int64_t max_depth,
                        int64_t vocab, const int64_t* vocabulary) {
  limits_ = limits;
  batch_ = batch;
  vocab_ = vocab;
  vocabulary_ = vocabulary;
  const int64_t width = std::max<int64_t>(1, std::min(limits.width, limits.max_nodes));
  const int64_t level = width * limits.num_choices;
  max_rows_ = batch * width;
  node_stride_ = std::max(level, max_depth * std::min(level, limits.max_nodes));
  top_ = TopLogProbs(max_rows_, vocab, limits.num_choices, statistics_);
  logits_ = logits_buffer_.get<float>(max_rows_ * vocab);
  log_probs_ = log_probs_buffer_.get<float>(max_rows_ * limits.num_choices);
  ids_ = ids_buffer_.get<int64_t>(max_rows_ * limits.num_choices);
  nodes_ = nodes_buffer_.get<Node>(batch * node_stride_);
  keys_ = keys_buffer_.get<uint64_t>(batch * node_stride_);
  places_ = places_buffer_.get<int64_t>(batch * node_stride_);
  num_nodes_.assign(batch, 0);
  next_.clear();
  next_.reserve(max_rows_);
  paths_.clear();
  paths_.reserve(max_rows_);
  for (int64_t sequence = 0; sequence < batch; ++sequence) paths_.push_back({sequence, -1, roots[sequence], -1, 0.0f});
}

void DraftSearch::descend(Pool& pool, const PackedMatrix& projection, const Activations& features, bool last) {
  project(pool, projection, features);
  pool.for_each(paths_.size(), [&](int64_t row) { top_.finish_row(logits_, row, log_probs_, ids_); });
  pool.for_each(1, [&](int64_t) { next_depth(last); });
}

void DraftSearch::project(Pool& pool, const PackedMatrix& projection, const Activations& features) const {
  constexpr int64_t kPanels = kLogitChunk / kPanel;
  const int64_t rows = paths_.size(), row_chunks = (rows + kRowChunk - 1) / kRowChunk, chunks = top_.num_chunks();
  pool.for_each(chunks * row_chunks, [&](int64_t item) {
    const int64_t chunk = item % chunks, first = item / chunks * kRowChunk;
    const int64_t count = std::min(kRowChunk, rows - first);
    const int64_t end = std::min((chunk + 1) * kPanels, panels_of(projection));
    linear_panels(projection, features, first, count, chunk * kPanels, end, logits_, vocab_);
    for (int64_t row = first; row < first + count; ++row) top_.scan_chunk(logits_, row, chunk);  // still in the cache
  });
}

void DraftSearch::next_depth(bool last) {
  next_.clear();
  const int64_t rows = paths_.size();
  for (int64_t first = 0, end; first < rows; first = end) {
    end = first + 1;
    while (end < rows && paths_[end].sequence == paths_[first].sequence) ++end;
    add_nodes(first, end, last);
  }
  std::swap(paths_, next_);
}

// The children of paths [first, end), all those of one sequence.
void DraftSearch::add_nodes(int64_t first, int64_t end, bool last) {
  const int64_t sequence = paths_[first].sequence, choices = limits_.num_choices;
  uint64_t* keys = keys_ + sequence * node_stride_;
  const auto score = [&](int64_t place) {
    return paths_[first + place / choices].log_prob + log_probs_[first * choices + place];
  };
  int64_t count = 0;
  for (int64_t place = 0; place < (end - first) * choices; ++place)
    if (score(place) > -INFINITY) keys[count++] = key_of(score(place), place);
  const int64_t kept = std::min(count, limits_.max_nodes);
  std::partial_sort(keys, keys + kept, keys + count, std::greater<>());
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t place = index_of(keys[i]), row = first + place / choices;
    const int64_t id = ids_[first * choices + place], token = vocabulary_ ? vocabulary_[id] : id;
    const int64_t node = num_nodes_[sequence]++;
    const float log_prob = score(place);
    nodes_[sequence * node_stride_ + node] = {token, paths_[row].node, place % choices, log_prob};
    if (!last && i < limits_.width && std::exp(log_prob) >= limits_.min_path_prob)
      next_.push_back({sequence, row, token, node, log_prob});
  }
}

void DraftSearch::finish(Pool& pool, const DraftTrees& out) {
  pool.for_each(batch_, [&](int64_t sequence) { write_tree(sequence, out); });
}

void DraftSearch::write_tree(int64_t sequence, const DraftTrees& out) const {
  const Node* nodes = nodes_ + sequence * node_stride_;
  uint64_t* keys = keys_ + sequence * node_stride_;
  int64_t* places = places_ + sequence * node_stride_;
  const int64_t count = num_nodes_[sequence], size = limits_.max_nodes, kept = std::min(count, size);
  for (int64_t node = 0; node < count; ++node) keys[node] = key_of(nodes[node].log_prob, node);
  // No node is likelier than its parent, and among equals the parent is the lower index: it stays, and stays before.
  std::partial_sort(keys, keys + kept, keys + count, std::greater<>());
  for (int64_t i = 0; i < kept; ++i) places[index_of(keys[i])] = i;
  for (int64_t i = 0, at = sequence * size; i < size; ++i, ++at) {
    const Node node = i < kept ? nodes[index_of(keys[i])] : Node{0, -1, 0, -INFINITY};
    out.tokens[at] = node.token;
    out.parents[at] = node.parent < 0 ? -1 : places[node.parent];
    out.log_probs[at] = node.log_prob;
    out.ranks[at] = node.rank;
  }
}

}  // namespace gorgon
