// The tokens of a drafter: their embeddings, which are the backbone's, and those that it can draft.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace gorgon {

struct DraftVocabulary {
  const void* embeddings;  // [num_embeddings, width], bf16 or fp32
  int64_t num_embeddings;
  int64_t embeddings_are_bf16;
  const int64_t* drafted;  // the token of each row of the projection; null: the row itself

  bool has(int64_t token) const { return token >= 0 && token < num_embeddings; }

  void embed(int64_t token, int64_t width, float* out) const {
    if (!embeddings_are_bf16) {
      std::memcpy(out, static_cast<const float*>(embeddings) + token * width, width * sizeof(float));
      return;
    }
    const uint16_t* row = static_cast<const uint16_t*>(embeddings) + token * width;
    for (int64_t i = 0; i < width; ++i) out[i] = bf16_to_float(row[i]);
  }
};

}  // namespace gorgon
