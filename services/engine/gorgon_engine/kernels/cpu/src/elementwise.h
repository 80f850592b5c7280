// The per-row steps between the products. Each reads and writes one row only, in an order fixed by its length.
#pragma once

#include <cstdint>

namespace gorgon {

// out = x / sqrt(mean(x^2) + eps) * weight. out may be x. weight null: no weight.
void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out);

// Rotates the pairs (i, i + dim / 2) of x in place.
void rotate(float* x, const float* cos, const float* sin, int64_t dim);

// out[i] = silu(gate_up[i]) * gate_up[n + i]. out may be gate_up.
void silu_multiply(const float* gate_up, int64_t n, float* out);

// out[i] = residual[i] + silu(x[i]). out may be residual.
void add_silu(const float* x, const float* residual, int64_t n, float* out);

// out = x * scale, as bf16 or fp32.
void store_scaled(const float* x, float scale, int64_t n, bool bf16, void* out);

}  // namespace gorgon
