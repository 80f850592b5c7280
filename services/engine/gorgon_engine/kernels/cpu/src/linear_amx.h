// The int8 product of more than a few rows on Intel's matrix unit (AMX): one instruction multiplies up to 16 rows by 16
// channels over a group of 64, in the time that vector code takes for two rows.
//
// The bits are those of linear.cpp. A group's sum is an exact int32 on either unit, and what follows (the +128 taken
// back, the scales, the sum over the groups in ascending order, the bias) is the same operations in the same order.
#pragma once

#include "linear.h"
#include "simd.h"

#if defined(GORGON_AVX512) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__) && \
    !defined(GORGON_NO_AMX)
#define GORGON_AMX 1

namespace gorgon {

// For one row, vector code is as quick: either waits for the weights.
constexpr int64_t kAmxMinRows = 2;

// Whether the tiles may be used: the kernel keeps their state only for a process that has asked. Asks once.
bool amx_granted();

// One thread's product for rows [row, row + rows) of act, at most kRowChunk. The thread's tiles are configured while it
// lives and released then: the state of tiles in use is saved at every switch of threads.
class AmxRows {
 public:
  AmxRows(const PackedMatrix& m, const Activations& act, int64_t row, int64_t rows);
  ~AmxRows();
  AmxRows(const AmxRows&) = delete;
  AmxRows& operator=(const AmxRows&) = delete;

  // out: row 0, channel 0.
  void panel(int64_t panel, float* out, int64_t out_stride, bool accumulate);

 private:
  const PackedMatrix& m_;
  const Activations& act_;
  int64_t row_, rows_;
  // The rows are cut into tiles of one height. The last begins early enough to be full, and leaves out what is done.
  int64_t num_tiles_, height_;
  alignas(64) uint32_t tail_[kGroup / 4 * kPanel];  // a last group of fewer than 64, with zeros behind
};

}  // namespace gorgon
#endif
