#include "elementwise.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace gorgon {
namespace {

inline int lanes_left(int64_t n, int64_t i) { return static_cast<int>(std::min<int64_t>(n - i, kLanes)); }

}  // namespace

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  F16 even = set1(0.0f), odd = set1(0.0f);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    const F16 a = load_n(x + i, lanes_left(n, i));
    even = fma(a, a, even);
    if (i + kLanes >= n) break;
    const F16 b = load_n(x + i + kLanes, lanes_left(n, i + kLanes));
    odd = fma(b, b, odd);
  }
  const float mean = reduce_add(even + odd) / static_cast<float>(n);
  const F16 factor = set1(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = lanes_left(n, i);
    const F16 y = load_n(x + i, count) * factor;
    store_n(out + i, weight ? y * load_n(weight + i, count) : y, count);
  }
}

void rotate(float* x, const float* cos, const float* sin, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int count = lanes_left(half, i);
    const F16 a = load_n(x + i, count), b = load_n(x + half + i, count);
    const F16 c = load_n(cos + i, count), s = load_n(sin + i, count);
    store_n(x + i, a * c - b * s, count);
    store_n(x + half + i, b * c + a * s, count);
  }
}

void silu_multiply(const float* gate_up, int64_t n, float* out) {
  const F16 one = set1(1.0f), zero = set1(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = lanes_left(n, i);
    const F16 gate = load_n(gate_up + i, count), up = load_n(gate_up + n + i, count);
    store_n(out + i, gate / (one + exp(zero - gate)) * up, count);
  }
}

void add_silu(const float* x, const float* residual, int64_t n, float* out) {
  const F16 one = set1(1.0f), zero = set1(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = lanes_left(n, i);
    const F16 value = load_n(x + i, count);
    store_n(out + i, load_n(residual + i, count) + value / (one + exp(zero - value)), count);
  }
}

void store_scaled(const float* x, float scale, int64_t n, bool bf16, void* out) {
  const F16 factor = set1(scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = lanes_left(n, i);
    const F16 y = load_n(x + i, count) * factor;
    if (!bf16) {
      store_n(static_cast<float*>(out) + i, y, count);
    } else if (count == kLanes) {
      store_bf16(static_cast<uint16_t*>(out) + i, y);
    } else {  // a neighbouring position begins right after: never write whole vectors past the end
      uint16_t lanes[kLanes];
      store_bf16(lanes, y);
      std::memcpy(static_cast<uint16_t*>(out) + i, lanes, count * sizeof(uint16_t));
    }
  }
}

}  // namespace gorgon

#define GORGON_API extern "C" __attribute__((visibility("default")))

GORGON_API void gorgon_rms_norm(const float* x, const float* weight, int64_t rows, int64_t n, float eps, float* out) {
  for (int64_t row = 0; row < rows; ++row) gorgon::rms_norm(x + row * n, weight, n, eps, out + row * n);
}

GORGON_API void gorgon_add_silu(const float* x, const float* residual, int64_t n, float* out) {
  gorgon::add_silu(x, residual, n, out);
}
