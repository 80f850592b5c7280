// The k largest entries of each row's log-softmax, of which nothing but those is ever written.
//
// A row is cut into blocks of one size, whatever the number of rows or threads, and the blocks' sums are joined in
// ascending order: a row's bits are its own. The k largest lie in the chunks whose maximum is one of the k largest
// maxima (or ties with them); no other chunk is looked at twice.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <functional>
#include <new>

#include "forward.h"
#include "ordering.h"
#include "pool.h"
#include "simd.h"

namespace gorgon {
namespace {

constexpr int64_t kColumns = 256;        // of a chunk: they share one maximum
constexpr int64_t kChunksPerBlock = 8;   // a block shares one sum: 8 KB, in L1 when it is read again
// Fewer are done by the caller alone: a parked thread, or one whose core another library spins on, comes too late.
constexpr int64_t kSerialValues = 1 << 18;
constexpr float kMinusInfinity = -INFINITY;

struct Task {
  const float* logits;  // [rows, vocab]
  int64_t rows, vocab, k;
  float* log_probs;  // [rows, k]
  int64_t* ids;      // [rows, k]
  int64_t chunks, blocks;
  float* chunk_max;  // [rows, chunks]
  float* block_max;  // [rows, blocks]
  float* block_sum;  // [rows, blocks], of exp(x - block_max); NaN where the block holds a NaN or +inf
};

F16 load_to(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, kMinusInfinity);
  std::copy(p, p + count, lanes);
  return load(lanes);
}

void scan_block(const Task& t, int64_t row, int64_t block) {
  const float* x = t.logits + row * t.vocab;
  const int64_t begin = block * kChunksPerBlock * kColumns;
  const int64_t end = std::min(t.vocab, begin + kChunksPerBlock * kColumns);
  F16 poison = set1(0.0f);
  float top = kMinusInfinity;
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t last = std::min(end, first + kColumns);
    F16 highest = set1(kMinusInfinity);
    for (int64_t i = first; i < last; i += kLanes) {
      const F16 values = load_to(x + i, last - i);
      highest = max(highest, values);
      // max() gives its second operand where either is a NaN. So -inf becomes finite, and only NaN and +inf are left
      // to turn a product with zero into a NaN.
      poison = fma(max(set1(-FLT_MAX), values), set1(0.0f), poison);
    }
    const float maximum = reduce_max(highest);
    t.chunk_max[row * t.chunks + first / kColumns] = maximum;
    top = std::max(top, maximum);
  }
  F16 even = poison, odd = set1(0.0f);
  if (top > kMinusInfinity) {
    for (int64_t i = begin; i < end; i += 2 * kLanes) {
      even = even + exp(load_to(x + i, end - i) - set1(top));
      if (i + kLanes < end) odd = odd + exp(load_to(x + i + kLanes, end - i - kLanes) - set1(top));
    }
  }
  t.block_max[row * t.blocks + block] = top;
  t.block_sum[row * t.blocks + block] = reduce_add(even + odd);
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

void select_row(const Task& t, int64_t row, double top, double log_total) {
  const float* x = t.logits + row * t.vocab;
  const float* maxima = t.chunk_max + row * t.chunks;
  uint64_t* keys = reinterpret_cast<uint64_t*>(t.ids + row * t.k);
  float floor = kMinusInfinity;  // the k-th largest value is not below it
  if (t.k <= t.chunks) {
    Largest chunks(keys, t.k);
    for (int64_t c = 0; c < t.chunks; ++c) chunks.push(key_of(maxima[c], c));
    floor = maxima[index_of(chunks.least())];
  }
  Largest best(keys, t.k);
  for (int64_t c = 0; c < t.chunks; ++c) {
    if (maxima[c] < floor) continue;
    const int64_t last = std::min(t.vocab, (c + 1) * kColumns);
    for (int64_t i = c * kColumns; i < last; ++i)
      if (x[i] >= floor) best.push(key_of(x[i], i));
  }
  best.sort_descending();
  for (int64_t i = 0; i < t.k; ++i) {
    const int64_t id = index_of(keys[i]);
    t.ids[row * t.k + i] = id;
    t.log_probs[row * t.k + i] = static_cast<float>(static_cast<double>(x[id]) - top - log_total);
  }
}

void finish_row(const Task& t, int64_t row) {
  const float* maxima = t.block_max + row * t.blocks;
  const float* sums = t.block_sum + row * t.blocks;
  const double top = *std::max_element(maxima, maxima + t.blocks);
  double total = 0.0;
  for (int64_t b = 0; b < t.blocks; ++b)
    total += maxima[b] > kMinusInfinity ? sums[b] * std::exp(maxima[b] - top) : static_cast<double>(sums[b]);
  if (total > 0.0) return select_row(t, row, top, std::log(total));
  for (int64_t i = 0; i < t.k; ++i) {  // no distribution at all
    t.ids[row * t.k + i] = i;
    t.log_probs[row * t.k + i] = kMinusInfinity;
  }
}

void top_log_probs(Task t) {
  static thread_local Buffer statistics;
  t.chunks = (t.vocab + kColumns - 1) / kColumns;
  t.blocks = (t.chunks + kChunksPerBlock - 1) / kChunksPerBlock;
  t.chunk_max = statistics.get<float>(t.rows * (t.chunks + 2 * t.blocks));
  t.block_max = t.chunk_max + t.rows * t.chunks;
  t.block_sum = t.block_max + t.rows * t.blocks;
  const auto scan = [&](int64_t item) { scan_block(t, item / t.blocks, item % t.blocks); };
  const auto finish = [&](int64_t row) { finish_row(t, row); };
  Pool& pool = Pool::instance();
  if (t.rows * t.vocab <= kSerialValues || pool.num_threads() == 1) {
    for (int64_t item = 0; item < t.rows * t.blocks; ++item) scan(item);
    for (int64_t row = 0; row < t.rows; ++row) finish(row);
    return;
  }
  pool.run([&] {
    pool.for_each(t.rows * t.blocks, scan);
    pool.for_each(t.rows, finish);
  });
}

}  // namespace
}  // namespace gorgon

// 1 where there is no memory.
extern "C" __attribute__((visibility("default"))) int gorgon_top_log_probs(const float* logits, int64_t rows,
                                                                           int64_t vocab, int64_t k, float* log_probs,
                                                                           int64_t* ids) {
  try {
    gorgon::top_log_probs({logits, rows, vocab, k, log_probs, ids, 0, 0, nullptr, nullptr, nullptr});
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
