// argmax(logits + Gumbel noise), the noise keyed by (seed, position, token): gorgon_engine/random.py in one pass.
//
// Philox4x32-10 (Salmon et al., SC'11) gives every token its 32 random bits; the two logarithms of the noise are taken
// only for tokens that can still win. noise = -log(-log1p(-u)) <= -log(u), and what bounds that costs no logarithm.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "buffer.h"
#include "pool.h"
#include "simd.h"

namespace gorgon {
namespace {

constexpr int kCounters = 64;  // a batch: a loop long enough for the compiler to vectorise
constexpr int kBlock = 4 * kCounters;  // tokens of a batch
constexpr int64_t kSegment = 32 * kBlock;  // tokens that one thread takes at a time
constexpr int64_t kSerialValues = 16384;  // not worth waking threads for
constexpr float kMinusInfinity = -INFINITY;
constexpr float kLn2 = 0.693147180559945f;

struct Key {
  uint64_t seed;
  uint64_t position;
  uint32_t stream;
};

// The random bits of the tokens 4 * first_counter and following.
void philox(const Key& key, uint32_t first_counter, uint32_t bits[kBlock]) {
  uint32_t v[4][kCounters];
  for (int i = 0; i < kCounters; ++i) {
    v[0][i] = first_counter + static_cast<uint32_t>(i);
    v[1][i] = static_cast<uint32_t>(key.position);
    v[2][i] = static_cast<uint32_t>(key.position >> 32);
    v[3][i] = key.stream;
  }
  uint32_t key_a = static_cast<uint32_t>(key.seed), key_b = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t a = static_cast<uint64_t>(v[0][i]) * 0xD2511F53u;
      const uint64_t b = static_cast<uint64_t>(v[2][i]) * 0xCD9E8D57u;
      const uint32_t c0 = static_cast<uint32_t>(b >> 32) ^ v[1][i] ^ key_a;
      const uint32_t c2 = static_cast<uint32_t>(a >> 32) ^ v[3][i] ^ key_b;
      v[0][i] = c0;
      v[1][i] = static_cast<uint32_t>(b);
      v[2][i] = c2;
      v[3][i] = static_cast<uint32_t>(a);
    }
    key_a += 0x9E3779B9u;
    key_b += 0xBB67AE85u;
  }
  for (int i = 0; i < kCounters; ++i)
    for (int word = 0; word < 4; ++word) bits[4 * i + word] = v[word][i];
}

float to_uniform(uint32_t bits) {
  const float u = static_cast<float>((static_cast<double>(bits) + 0.5) * 0x1p-32);
  const float below_one = 1.0f - 0x1p-24f;
  return u < below_one ? u : below_one;
}

float gumbel(float u) { return -std::log(-std::log1p(-u)); }

// Not below -log(u) for the u of these bits. With x = 2^e (1 + m), log2(x) >= e + m, which is the float's own pattern.
inline float gumbel_bound(uint32_t bits) {
  const float x = static_cast<float>(static_cast<int32_t>(bits >> 1)) + 0.25f;  // <= u * 2^31
  int32_t pattern;
  std::memcpy(&pattern, &x, 4);
  const float log2_x = static_cast<float>(pattern) * 0x1p-23f - 127.0f;
  return kLn2 * (31.0f - log2_x) + 1e-3f;  // and more than all that was rounded
}

struct Best {
  float value = kMinusInfinity;
  int64_t token = 0;

  void take(float other_value, int64_t other_token) {
    if (other_value > value || (other_value == value && other_token < token)) {
      value = other_value;
      token = other_token;
    }
  }
};

float highest_of(const float* values, int64_t count) {
  F16 top = set1(kMinusInfinity);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) top = max(top, load(values + i));
  float highest = reduce_max(top);
  for (; i < count; ++i) highest = std::max(highest, values[i]);
  return highest;
}

// The first of the largest logits, with its noise: likely to win, so that few others have to be looked at.
Best favourite(const float* logits, int64_t vocab, const Key& key) {
  const float highest = highest_of(logits, vocab);
  if (highest == kMinusInfinity) return {};
  const int64_t token = std::find(logits, logits + vocab, highest) - logits;
  if (token == vocab) return {};  // not a number
  uint32_t bits[kBlock];
  philox(key, static_cast<uint32_t>(token / 4), bits);
  return {highest + gumbel(to_uniform(bits[token % 4])), token};
}

// The best of the tokens [begin, end) and `best`; begin is a multiple of kBlock.
Best scan(const float* logits, int64_t begin, int64_t end, const Key& key, Best best) {
  uint32_t bits[kBlock];
  float ceilings[kBlock];
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, end - start);
    const float highest = highest_of(logits + start, count);
    // 23 bounds all noise that 32 bits can give (-log(2^-33) = 22.9).
    if (highest + 23.0f < best.value || highest == kMinusInfinity) continue;
    philox(key, static_cast<uint32_t>(start / 4), bits);
    for (int64_t i = 0; i < count; ++i) ceilings[i] = logits[start + i] + gumbel_bound(bits[i]);
    if (highest_of(ceilings, count) < best.value) continue;
    for (int64_t i = 0; i < count; ++i) {
      if (ceilings[i] >= best.value) best.take(logits[start + i] + gumbel(to_uniform(bits[i])), start + i);
    }
  }
  return best;
}

void gumbel_argmax(const float* logits, int64_t rows, int64_t vocab, const int64_t* seeds, const int64_t* positions,
                   uint32_t stream, int64_t* tokens) {
  static thread_local Buffer memory;
  const int64_t num_segments = (vocab + kSegment - 1) / kSegment;
  Best* const favourites = memory.get<Best>(rows * (1 + num_segments));
  Best* const found = favourites + rows;
  const auto key = [&](int64_t row) {
    return Key{static_cast<uint64_t>(seeds[row]), static_cast<uint64_t>(positions[row]), stream};
  };
  const auto begin = [&](int64_t row) { favourites[row] = favourite(logits + row * vocab, vocab, key(row)); };
  const auto look = [&](int64_t item) {
    const int64_t row = item / num_segments, first = item % num_segments * kSegment;
    const int64_t last = std::min(first + kSegment, vocab);
    found[item] = scan(logits + row * vocab, first, last, key(row), favourites[row]);
  };
  Pool& pool = Pool::instance();
  if (rows * vocab <= kSerialValues || pool.num_threads() == 1) {
    for (int64_t row = 0; row < rows; ++row) begin(row);
    for (int64_t item = 0; item < rows * num_segments; ++item) look(item);
  } else {
    pool.run([&] {
      pool.for_each(rows, begin);
      pool.for_each(rows * num_segments, look);
    });
  }
  for (int64_t row = 0; row < rows; ++row) {
    Best best = favourites[row];
    for (int64_t i = row * num_segments; i < (row + 1) * num_segments; ++i) best.take(found[i].value, found[i].token);
    tokens[row] = best.token;
  }
}

}  // namespace
}  // namespace gorgon

// 1 where there is no memory.
extern "C" __attribute__((visibility("default"))) int gorgon_gumbel_argmax(const float* logits, int64_t rows,
                                                                           int64_t vocab, const int64_t* seeds,
                                                                           const int64_t* positions, int32_t stream,
                                                                           int64_t* tokens) {
  try {
    gorgon::gumbel_argmax(logits, rows, vocab, seeds, positions, static_cast<uint32_t>(stream), tokens);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
