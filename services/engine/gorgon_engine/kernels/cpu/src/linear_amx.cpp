#include "linear_amx.h"

#if defined(GORGON_AMX)
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "linear_ops.h"

namespace gorgon {
namespace {

constexpr int64_t kGroupWords = kGroup / 4 * kPanel;  // of one panel's weights for one group
constexpr int64_t kGroupBytes = 4 * kGroupWords;
constexpr int kTileRows = 16;

// The operand of ldtilecfg.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Tiles 0-3 hold sums, 4 and 5 activations, 6 and 7 the weights of either half of a panel.
void configure_tiles(int64_t height) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? height : kGroup / 4);
  }
  asm volatile("ldtilecfg %0" : : "m"(config));  // g++ 12's _tile_loadconfig() claims to read eight bytes only
}

struct Pass {
  const char* act;  // the tile's first row
  int64_t act_stride;
  const float* group_scales;
  const int32_t* group_sums;
  int64_t scale_stride;  // from one row's scales to the next's, and sums
  int64_t groups;
  const uint32_t* weights;
  const uint32_t* last_weights;  // of the last group
  const char* prefetch;          // this pass's part of the panel that comes next
  int64_t rows;                  // of all passes together
};

// The sums of one group into tiles 0 and 1, or (Odd) 2 and 3. Tile numbers are literals, hence the code twice.
template <bool Odd>
[[gnu::always_inline]] inline void multiply_group(const char* act, int64_t act_stride, const uint32_t* weights) {
  if constexpr (Odd) {
    _tile_loadd(5, act, act_stride);
    _tile_zero(2);
    _tile_loadd(6, weights, 4 * kPanel);
    _tile_dpbsud(2, 5, 6);
    _tile_zero(3);
    _tile_loadd(7, weights + kLanes, 4 * kPanel);
    _tile_dpbsud(3, 5, 7);
  } else {
    _tile_loadd(4, act, act_stride);
    _tile_zero(0);
    _tile_loadd(6, weights, 4 * kPanel);
    _tile_dpbsud(0, 4, 6);
    _tile_zero(1);
    _tile_loadd(7, weights + kLanes, 4 * kPanel);
    _tile_dpbsud(1, 4, 7);
  }
}

template <bool Odd>
[[gnu::always_inline]] inline void store_group(int32_t (&sums)[2][kTileRows * kLanes]) {
  if constexpr (Odd) {
    _tile_stored(2, sums[0], 64);
    _tile_stored(3, sums[1], 64);
  } else {
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
  }
}

// out[r][v] = the fp32 sums over all groups. The next group is multiplied before a group's tiles are stored and added
// up: behind a store that waits for its multiplication, everything waits.
template <int Rows>
[[gnu::always_inline]] inline void sum_groups(const Pass& p, F16 (&out)[Rows][2]) {
  constexpr int prefetches = (kGroupBytes / 64 + Rows - 1) / Rows;
  alignas(64) int32_t sums[2][kTileRows * kLanes];
  F16 acc[Rows][2];
  unrolled<Rows>([&](auto r) { acc[r][0] = acc[r][1] = set1(0.0f); });
  const char *act = p.act, *prefetch = p.prefetch;
  const uint32_t* weights = p.weights;
  const int64_t groups = p.groups, stride = p.scale_stride, slots = p.rows * prefetches;
  const int64_t gap = (kGroupBytes + slots - 1) / slots;
  // One base pointer for four rows: the x86 addressing modes reach the other three.
  const float* scales[(Rows + 3) / 4];
  const int32_t* offsets[(Rows + 3) / 4];
  unrolled<(Rows + 3) / 4>([&](auto i) {
    scales[i] = p.group_scales + 4 * i * stride;
    offsets[i] = p.group_sums + 4 * i * stride;
  });

  const auto multiply_next = [&](auto odd, int64_t group) {
    if (group >= groups) return;
    multiply_group<odd>(act, p.act_stride, group + 1 < groups ? weights : p.last_weights);
    act += kGroup;
    weights += kGroupWords;
  };
  multiply_next(std::false_type{}, 0);
  for (int64_t group = 0; group < groups; ++group) {
    if (group % 2 == 0) {
      multiply_next(std::true_type{}, group + 1);
      store_group<false>(sums);
    } else {
      multiply_next(std::false_type{}, group + 1);
      store_group<true>(sums);
    }
    unrolled<Rows>([&](auto r) {
      unrolled<prefetches>([&](auto) {
        __builtin_prefetch(prefetch, 0, 2);
        prefetch += gap;
      });
      const __m512i offset = _mm512_set1_epi32(offsets[r / 4][r % 4 * stride + group]);
      const F16 scale = set1(scales[r / 4][r % 4 * stride + group]);
      unrolled<2>([&](auto v) {
        const __m512i sum = _mm512_load_si512(sums[v] + r * kLanes);
        acc[r][v] = fma(F16{_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offset))}, scale, acc[r][v]);
      });
    });
  }
  unrolled<Rows>([&](auto r) { unrolled<2>([&](auto v) { out[r][v] = acc[r][v]; }); });
}

// Rows [skip, Rows) of a tile, into out (row 0 of the tile, channel 0 of the panel).
template <int Rows>
void multiply_tile(const Pass& p, const PanelOutput& out, int skip) {
  alignas(64) F16 sums[Rows][2];
  sum_groups<Rows>(p, sums);
  for (int v = 0; v < 2; ++v) {
    const F16 scale = load(out.channel_scales + v * kLanes);
    for (int r = skip; r < Rows; ++r) finish(out, sums[r][v] * scale, r, v * kLanes);
  }
}

template <int... Index>
void dispatch(const Pass& p, const PanelOutput& out, int64_t rows, int64_t skip, std::integer_sequence<int, Index...>) {
  using Function = void (*)(const Pass&, const PanelOutput&, int);
  static constexpr Function table[] = {multiply_tile<Index + 1>...};
  table[rows - 1](p, out, static_cast<int>(skip));
}

}  // namespace

bool amx_granted() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
}

AmxRows::AmxRows(const PackedMatrix& m, const Activations& act, int64_t row, int64_t rows)
    : m_(m),
      act_(act),
      row_(row),
      rows_(rows),
      num_tiles_((rows + kTileRows - 1) / kTileRows),
      height_((rows + num_tiles_ - 1) / num_tiles_) {
  configure_tiles(height_);
  if (steps_of(m) % (kGroup / 4)) std::memset(tail_, 0, sizeof(tail_));
}

AmxRows::~AmxRows() { _tile_release(); }

void AmxRows::panel(int64_t panel, float* out, int64_t out_stride, bool accumulate) {
  const int64_t steps = steps_of(m_), groups = activation_groups(m_.in_features);
  const uint32_t* weights = m_.data + panel * steps * kPanel;
  const uint32_t* last = weights + (groups - 1) * kGroupWords;
  if (const int64_t left = steps % (kGroup / 4)) {
    std::memcpy(tail_, last, left * kPanel * sizeof(uint32_t));
    last = tail_;
    asm volatile("" : : "r"(tail_) : "memory");  // g++ does not know that _tile_loadd() reads memory
  }
  const char* next = reinterpret_cast<const char*>(weights + steps * kPanel);
  for (int64_t tile = 0; tile < num_tiles_; ++tile) {
    const int64_t first = std::min(tile * height_, rows_ - height_), row = row_ + first;
    const int64_t stride = row_words(m_.kind, m_.in_features, act_);
    const Pass pass{reinterpret_cast<const char*>(act_.words + row * stride),
                    4 * stride,
                    act_.scales + row * act_.groups,
                    act_.sums + row * act_.groups,
                    act_.groups,
                    groups,
                    weights,
                    last,
                    next + tile * steps * 4 * kPanel / num_tiles_,
                    num_tiles_ * height_};
    dispatch(pass, panel_output(m_, panel, out + row * out_stride, out_stride, accumulate), height_,
             tile * height_ - first, std::make_integer_sequence<int, kTileRows>{});
  }
}

}  // namespace gorgon
#endif
