// Memory for activations that is kept between calls.
#pragma once

#include "buffer.h"
#include "linear.h"

namespace gorgon {

class ActivationBuffer {
 public:
  // For `rows` rows of up to `widest` values. Throws std::bad_alloc.
  Activations get(int64_t rows, int64_t widest) {
    const int64_t stride = activation_words(widest), groups = activation_groups(widest);
    return {words_.get<uint32_t>(rows * stride), stride, scales_.get<float>(rows * groups),
            sums_.get<int32_t>(rows * groups), groups};
  }

 private:
  Buffer words_, scales_, sums_;
};

}  // namespace gorgon
