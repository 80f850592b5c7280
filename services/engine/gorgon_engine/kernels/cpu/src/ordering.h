// Order by value and then by place, as one integer comparison.
#pragma once

#include <cstdint>
#include <cstring>

namespace gorgon {

// A greater key is a greater value, or an equal one with a lower index (below 2^32). -0 counts as 0; no NaN.
inline uint64_t key_of(float value, int64_t index) {
  value += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

inline int64_t index_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

}  // namespace gorgon
