#include "top_log_probs.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>

#include "ordering.h"
#include "pool.h"
#include "simd.h"

namespace gorgon {
namespace {

// Fewer are done by the caller alone: a parked thread, or one whose core another library spins on, comes too late.
constexpr int64_t kSerialValues = 1 << 18;
constexpr float kMinusInfinity = -INFINITY;

F16 load_to(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, kMinusInfinity);
  std::copy(p, p + count, lanes);
  return load(lanes);
}

// The k largest of the keys pushed, in memory of the caller's: a heap with the least on top.
class Largest {
 public:
  Largest(uint64_t* keys, int64_t k) : keys_(keys), k_(k) {}

  void push(uint64_t key) {
    if (size_ == k_) {
      if (key < keys_[0]) return;
      std::pop_heap(keys_, keys_ + size_--, std::greater<>());
    }
    keys_[size_++] = key;
    std::push_heap(keys_, keys_ + size_, std::greater<>());
  }
  uint64_t least() const { return keys_[0]; }
  void sort_descending() { std::sort_heap(keys_, keys_ + size_, std::greater<>()); }

 private:
  uint64_t* keys_;
  int64_t k_, size_ = 0;
};

}  // namespace

TopLogProbs::TopLogProbs(int64_t rows, int64_t vocab, int64_t k, Buffer& statistics)
    : vocab_(vocab), k_(k), num_chunks_((vocab + kLogitChunk - 1) / kLogitChunk) {
  maxima_ = statistics.get<float>(2 * rows * num_chunks_);
  sums_ = maxima_ + rows * num_chunks_;
}

void TopLogProbs::scan_chunk(const float* logits, int64_t row, int64_t chunk) const {
  const float* x = logits + row * vocab_;
  const int64_t begin = chunk * kLogitChunk, end = std::min(vocab_, begin + kLogitChunk);
  F16 poison = set1(0.0f), highest = set1(kMinusInfinity);
  for (int64_t i = begin; i < end; i += kLanes) {
    const F16 values = load_to(x + i, end - i);
    highest = max(highest, values);
    // max() gives its second operand where either is a NaN. So -inf becomes finite, and only NaN and +inf are left to
    // turn a product with zero into a NaN.
    poison = fma(max(set1(-FLT_MAX), values), set1(0.0f), poison);
  }
  const float top = reduce_max(highest);
  F16 even = poison, odd = set1(0.0f);
  if (top > kMinusInfinity) {
    for (int64_t i = begin; i < end; i += 2 * kLanes) {
      even = even + exp(load_to(x + i, end - i) - set1(top));
      if (i + kLanes < end) odd = odd + exp(load_to(x + i + kLanes, end - i - kLanes) - set1(top));
    }
  }
  maxima_[row * num_chunks_ + chunk] = top;
  sums_[row * num_chunks_ + chunk] = reduce_add(even + odd);
}

void TopLogProbs::select(const float* x, const float* maxima, double top, double log_total, float* log_probs,
                         int64_t* ids) const {
  uint64_t* keys = reinterpret_cast<uint64_t*>(ids);
  float floor = kMinusInfinity;  // the k-th largest value is not below it
  if (k_ <= num_chunks_) {
    Largest chunks(keys, k_);
    for (int64_t c = 0; c < num_chunks_; ++c) chunks.push(key_of(maxima[c], c));
    floor = maxima[index_of(chunks.least())];
  }
  Largest best(keys, k_);
  for (int64_t c = 0; c < num_chunks_; ++c) {
    if (maxima[c] < floor) continue;
    const int64_t end = std::min(vocab_, (c + 1) * kLogitChunk);
    for (int64_t i = c * kLogitChunk; i < end; ++i)
      if (x[i] >= floor) best.push(key_of(x[i], i));
  }
  best.sort_descending();
  for (int64_t i = 0; i < k_; ++i) {
    const int64_t id = index_of(keys[i]);
    ids[i] = id;
    log_probs[i] = static_cast<float>(static_cast<double>(x[id]) - top - log_total);
  }
}

void TopLogProbs::finish_row(const float* logits, int64_t row, float* log_probs, int64_t* ids) const {
  const float* maxima = maxima_ + row * num_chunks_;
  const float* sums = sums_ + row * num_chunks_;
  const double top = *std::max_element(maxima, maxima + num_chunks_);
  double total = 0.0;
  for (int64_t c = 0; c < num_chunks_; ++c)
    total += maxima[c] > kMinusInfinity ? sums[c] * std::exp(maxima[c] - top) : static_cast<double>(sums[c]);
  log_probs += row * k_;
  ids += row * k_;
  if (total > 0.0) return select(logits + row * vocab_, maxima, top, std::log(total), log_probs, ids);
  for (int64_t i = 0; i < k_; ++i) {  // no distribution at all
    ids[i] = i;
    log_probs[i] = kMinusInfinity;
  }
}

namespace {

void top_log_probs(const float* logits, int64_t rows, int64_t vocab, int64_t k, float* log_probs, int64_t* ids) {
  static thread_local Buffer statistics;
  const TopLogProbs task(rows, vocab, k, statistics);
  const int64_t items = rows * task.num_chunks();
  const auto scan = [&](int64_t item) { task.scan_chunk(logits, item / task.num_chunks(), item % task.num_chunks()); };
  const auto finish = [&](int64_t row) { task.finish_row(logits, row, log_probs, ids); };
  Pool& pool = Pool::instance();
  if (rows * vocab <= kSerialValues || pool.num_threads() == 1) {
    for (int64_t item = 0; item < items; ++item) scan(item);
    for (int64_t row = 0; row < rows; ++row) finish(row);
    return;
  }
  pool.run([&] {
    pool.for_each(items, scan);
    pool.for_each(rows, finish);
  });
}

}  // namespace
}  // namespace gorgon

// 1 where there is no memory.
extern "C" __attribute__((visibility("default"))) int gorgon_top_log_probs(const float* logits, int64_t rows,
                                                                           int64_t vocab, int64_t k, float* log_probs,
                                                                           int64_t* ids) {
  try {
    gorgon::top_log_probs(logits, rows, vocab, k, log_probs, ids);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
