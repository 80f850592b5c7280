// The k largest entries of each row's log-softmax, of which nothing but those is ever written.
//
// A row is cut into chunks of one size, whatever the number of rows or threads, and the chunks' sums are joined in
// ascending order: a row's bits are its own. The k largest lie in the chunks whose maximum is one of the k largest
// maxima (or ties with them); no other chunk is looked at twice.
#pragma once

#include <cstdint>

#include "buffer.h"

namespace gorgon {

constexpr int64_t kLogitChunk = 256;  // columns: 1 KB, in L1 when it is read again

class TopLogProbs {
 public:
  TopLogProbs() = default;
  // For rows of `vocab` logits, k <= vocab. statistics: lives as long as this is used. Throws std::bad_alloc.
  TopLogProbs(int64_t rows, int64_t vocab, int64_t k, Buffer& statistics);

  int64_t num_chunks() const { return num_chunks_; }

  // First all chunks of a row, in any order, by any threads. logits: [rows, vocab].
  void scan_chunk(const float* logits, int64_t row, int64_t chunk) const;

  // Then the row: its k likeliest, descending, the lower id first among equal logits. log_probs, ids: [rows, k].
  // A row with a NaN, a +inf or nothing but -inf: log_probs -inf for the ids 0 to k - 1.
  void finish_row(const float* logits, int64_t row, float* log_probs, int64_t* ids) const;

 private:
  void select(const float* x, const float* maxima, double top, double log_total, float* log_probs, int64_t* ids) const;

  int64_t vocab_ = 0, k_ = 0, num_chunks_ = 0;
  float* maxima_ = nullptr;  // [rows, num_chunks]
  float* sums_ = nullptr;    // [rows, num_chunks], of exp(x - maximum); NaN where the chunk holds a NaN or +inf
};

}  // namespace gorgon
