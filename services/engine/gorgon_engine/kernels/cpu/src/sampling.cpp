// argmax(logits + Gumbel noise), the noise keyed by (seed, position, token): gorgon_engine/random.py in one pass.
//
// Philox4x32-10 (Salmon et al., SC'11) gives every token its 32 random bits; the two logarithms of the noise are taken
// only for tokens that can still win. noise = -log(-log1p(-u)) <= -log(u), and the binary exponent of u bounds that.
#include <cmath>
#include <cstdint>
#include <cstring>


namespace gorgon {
namespace {

constexpr int kBlocks = 64;  // counters a batch: a loop long enough for the compiler to vectorise
constexpr float kLn2 = 0.693147180559945f;

struct Words {
  uint32_t v[4][kBlocks];
};

void philox(uint32_t first_block, uint32_t position_low, uint32_t position_high, uint32_t stream, uint32_t key_a,
            uint32_t key_b, Words& w) {
  for (int i = 0; i < kBlocks; ++i) {
    w.v[0][i] = first_block + static_cast<uint32_t>(i);
    w.v[1][i] = position_low;
    w.v[2][i] = position_high;
    w.v[3][i] = stream;
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kBlocks; ++i) {
      const uint64_t a = static_cast<uint64_t>(w.v[0][i]) * 0xD2511F53u;
      const uint64_t b = static_cast<uint64_t>(w.v[2][i]) * 0xCD9E8D57u;
      const uint32_t c0 = static_cast<uint32_t>(b >> 32) ^ w.v[1][i] ^ key_a;
      const uint32_t c2 = static_cast<uint32_t>(a >> 32) ^ w.v[3][i] ^ key_b;
      w.v[0][i] = c0;
      w.v[1][i] = static_cast<uint32_t>(b);
      w.v[2][i] = c2;
      w.v[3][i] = static_cast<uint32_t>(a);
    }
    key_a += 0x9E3779B9u;
    key_b += 0xBB67AE85u;
  }
}

float to_uniform(uint32_t bits) {
  const float u = static_cast<float>((static_cast<double>(bits) + 0.5) * 0x1p-32);
  const float below_one = 1.0f - 0x1p-24f;
  return u < below_one ? u : below_one;
}

float gumbel(float u) { return -std::log(-std::log1p(-u)); }

// Not below -log(u) for the u of these bits: leading zeros are how many times it was halved.
float gumbel_bound(uint32_t bits) { return kLn2 * static_cast<float>(1 + __builtin_clz(bits | 1u)); }

int64_t sample_row(const float* logits, int64_t vocab, uint64_t seed, uint64_t position, uint32_t stream) {
  Words words;
  int64_t best_token = 0;
  float best = -INFINITY;
  for (int64_t start = 0; start < vocab; start += 4 * kBlocks) {
    const int64_t count = vocab - start < 4 * kBlocks ? vocab - start : 4 * kBlocks;
    float highest = -INFINITY;
    for (int64_t i = 0; i < count; ++i) highest = logits[start + i] > highest ? logits[start + i] : highest;
    // 23 bounds all noise that 32 bits can give (-log(2^-33) = 22.9).
    if (highest + 23.0f < best || highest == -INFINITY) continue;
    philox(static_cast<uint32_t>(start / 4), static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
           stream, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), words);
    for (int64_t i = 0; i < count; ++i) {
      const float logit = logits[start + i];
      const uint32_t bits = words.v[i % 4][i / 4];
      if (logit + gumbel_bound(bits) < best) continue;
      const float value = logit + gumbel(to_uniform(bits));
      if (value > best) {
        best = value;
        best_token = start + i;
      }
    }
  }
  return best_token;
}

}  // namespace
}  // namespace gorgon

extern "C" __attribute__((visibility("default"))) void gorgon_gumbel_argmax(const float* logits, int64_t rows,
                                                                            int64_t vocab, const int64_t* seeds,
                                                                            const int64_t* positions, int32_t stream,
                                                                            int64_t* tokens) {
  for (int64_t row = 0; row < rows; ++row) {
    tokens[row] = gorgon::sample_row(logits + row * vocab, vocab, static_cast<uint64_t>(seeds[row]),
                                     static_cast<uint64_t>(positions[row]), static_cast<uint32_t>(stream));
  }
}
