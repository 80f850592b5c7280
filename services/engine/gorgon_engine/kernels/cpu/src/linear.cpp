#include "linear.h"

#include <algorithm>
#include <optional>

#include "linear_amx.h"
#include "linear_ops.h"

namespace gorgon {
namespace {

struct Tile {
  const uint32_t* act;
  int64_t act_stride;
  const float* group_scales;
  const int32_t* group_sums;
  int64_t groups;
  const uint32_t* weights;
  const char* prefetch;  // this tile's part of the panel that comes next, and the bytes of it to fetch a step
  int64_t prefetch_bytes;
  int64_t steps;
  PanelOutput out;
};

// out[r][v] = the sum over steps [begin, end) of the tile.
template <typename Op, int Rows, int Vectors>
[[gnu::always_inline]] inline void run_steps(const Tile& t, int64_t begin, int64_t end, const uint32_t* w,
                                             typename Op::Acc (&out)[Rows][Vectors]) {
  typename Op::Acc acc[Rows][Vectors];
  unrolled<Rows>([&](auto r) { unrolled<Vectors>([&](auto v) { acc[r][v] = Op::zero(); }); });
  // One base pointer for four rows: the x86 addressing modes reach the other three, so twelve rows fit the registers.
  const uint32_t* base[(Rows + 3) / 4];
  unrolled<(Rows + 3) / 4>([&](auto i) { base[i] = t.act + 4 * i * t.act_stride; });
  const int64_t stride = t.act_stride, advance = t.prefetch_bytes, second = advance / 2;
  const char* prefetch = t.prefetch + begin * advance;
  for (int64_t s = begin; s < end; ++s, w += 2 * kLanes, prefetch += advance) {
    __builtin_prefetch(prefetch, 0, 2);
    __builtin_prefetch(prefetch + second, 0, 2);
    typename Op::Weight weight[Vectors];
    unrolled<Vectors>([&](auto v) { weight[v] = Op::weight(w + v * kLanes); });
    unrolled<Rows>([&](auto r) {
      const typename Op::Act a = Op::act(base[r / 4] + (r % 4) * stride + s);
      unrolled<Vectors>([&](auto v) { Op::step(acc[r][v], weight[v], a); });
    });
  }
  unrolled<Rows>([&](auto r) { unrolled<Vectors>([&](auto v) { out[r][v] = acc[r][v]; }); });
}

// Inlined into the loop over groups, ten rows and more make g++ spill (twelve then take longer than sixteen); with few
// rows the call itself would show.
template <typename Op, int Rows, int Vectors>
[[gnu::noinline]] void run_steps_apart(const Tile& t, int64_t begin, int64_t end, const uint32_t* w,
                                       typename Op::Acc (&out)[Rows][Vectors]) {
  run_steps<Op, Rows, Vectors>(t, begin, end, w, out);
}

template <typename Op, int Rows, int Vectors>
void multiply(const Tile& t, int first_vector) {
  alignas(64) typename Op::Acc acc[Rows][Vectors];
  alignas(64) F16 sums[Rows][Vectors];
  const uint32_t* w = t.weights + first_vector * kLanes;
  if constexpr (std::is_same_v<Op, Int8Op>) {
    constexpr int64_t steps = kGroup / 4;
    for (auto& row : sums)
      for (F16& sum : row) sum = set1(0.0f);
    for (int64_t begin = 0, group = 0; begin < t.steps; begin += steps, ++group, w += 2 * kLanes * steps) {
      const int64_t end = std::min(begin + steps, t.steps);
      if constexpr (Rows * Vectors >= 20) run_steps_apart<Op, Rows, Vectors>(t, begin, end, w, acc);
      else run_steps<Op, Rows, Vectors>(t, begin, end, w, acc);
      for (int r = 0; r < Rows; ++r) {
        const int64_t at = r * t.groups + group;
        for (int v = 0; v < Vectors; ++v)
          sums[r][v] = fma(Op::to_float(acc[r][v], t.group_sums[at]), set1(t.group_scales[at]), sums[r][v]);
      }
    }
    for (auto& row : sums)
      for (int v = 0; v < Vectors; ++v) row[v] = row[v] * load(t.out.channel_scales + (first_vector + v) * kLanes);
  } else {
    run_steps<Op, Rows, Vectors>(t, 0, t.steps, w, sums);
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) finish(t.out, sums[r][v], r, (first_vector + v) * kLanes);
}

template <typename Op, int Rows>
void multiply_panel(const Tile& t) {
  for (int v = 0; v < 2; v += kVectorsPerTile) multiply<Op, Rows, kVectorsPerTile>(t, v);
}

template <typename Op, int... Index>
void dispatch(const Tile& t, int rows, std::integer_sequence<int, Index...>) {
  using Function = void (*)(const Tile&);
  static constexpr Function table[] = {multiply_panel<Op, Index + 1>...};
  table[rows - 1](t);
}

template <typename Op>
void panel_rows(const PackedMatrix& m, const Activations& act, int64_t row, int64_t rows, int64_t panel, float* out,
                int64_t out_stride, bool accumulate) {
  const int64_t blocks = (rows + Op::kMaxRows - 1) / Op::kMaxRows;
  const int64_t stride = row_words(m.kind, m.in_features, act);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = row + rows * block / blocks;
    const int64_t count = row + rows * (block + 1) / blocks - first;
    const uint32_t* weights = m.data + panel * steps_of(m) * kPanel;
    const char* next = reinterpret_cast<const char*>(weights + steps_of(m) * kPanel);
    const Tile tile{act.words + first * stride,
                    stride,
                    act.scales + first * act.groups,
                    act.sums + first * act.groups,
                    act.groups,
                    weights,
                    next + block * steps_of(m) * 128 / blocks / 64 * 64,
                    blocks == 1 ? 128 : 64,
                    steps_of(m),
                    panel_output(m, panel, out + first * out_stride, out_stride, accumulate)};
    dispatch<Op>(tile, static_cast<int>(count), std::make_integer_sequence<int, Op::kMaxRows>{});
  }
}

void linear_panel(const PackedMatrix& m, const Activations& act, int64_t row, int64_t rows, int64_t panel, float* out,
                  int64_t out_stride, bool accumulate) {
  if (m.kind == kFp32) panel_rows<Fp32Op>(m, act, row, rows, panel, out, out_stride, accumulate);
  else if (m.kind == kBf16) panel_rows<Bf16Op>(m, act, row, rows, panel, out, out_stride, accumulate);
  else panel_rows<Int8Op>(m, act, row, rows, panel, out, out_stride, accumulate);
}

// One thread's product for rows [row, row + rows), panel by panel.
class RowRange {
 public:
  RowRange(const PackedMatrix& m, const Activations& act, int64_t row, int64_t rows)
      : m_(m), act_(act), row_(row), rows_(rows) {
#if defined(GORGON_AMX)
    if (m.kind == kInt8 && rows >= kAmxMinRows && amx_granted()) amx_.emplace(m, act, row, rows);
#endif
  }

  void panel(int64_t panel, float* out, int64_t out_stride, bool accumulate) {
#if defined(GORGON_AMX)
    if (amx_) return amx_->panel(panel, out, out_stride, accumulate);
#endif
    linear_panel(m_, act_, row_, rows_, panel, out, out_stride, accumulate);
  }

 private:
  const PackedMatrix& m_;
  const Activations& act_;
  int64_t row_, rows_;
#if defined(GORGON_AMX)
  std::optional<AmxRows> amx_;
#endif
};

}  // namespace

void prepare_row(int32_t kind, const float* x, int64_t in_features, const Activations& act, int64_t row) {
  uint32_t* words = act.words + row * row_words(kind, in_features, act);
  const int64_t n = in_features;
  if (kind == kFp32) {
    std::memcpy(words, x, n * sizeof(float));
  } else if (kind == kBf16) {
    for (int64_t i = 0; i < n; i += kLanes)
      store_bf16(reinterpret_cast<uint16_t*>(words) + i, load_n(x + i, static_cast<int>(std::min<int64_t>(n - i, 16))));
  } else {
    for (int64_t group = 0; group * kGroup < n; ++group) {
      const int64_t first = group * kGroup, end = std::min(first + kGroup, n);
      const auto values = [&](int64_t i) {
        return load_n(x + i, static_cast<int>(std::min<int64_t>(end - i, kLanes)));
      };
      F16 largest = set1(0.0f);
      for (int64_t i = first; i < end; i += kLanes) largest = max(largest, abs(values(i)));
      const float absmax = reduce_max(largest);
      const F16 inverse = set1(absmax > 0.0f ? 127.0f / absmax : 0.0f);
      F16 sum = set1(0.0f);
      for (int64_t i = first; i < end; i += kLanes)
        sum = sum + store_int8(reinterpret_cast<int8_t*>(words) + i, values(i) * inverse);
      act.scales[row * act.groups + group] = absmax / 127.0f;
      act.sums[row * act.groups + group] = 128 * static_cast<int32_t>(reduce_add(sum));  // small integers: exact
    }
    const int64_t written = activation_words(n);
    std::memset(reinterpret_cast<int8_t*>(words) + written, 0, activation_groups(n) * kGroup - written);
  }
}

void linear_panels(const PackedMatrix& m, const Activations& act, int64_t row, int64_t rows, int64_t begin, int64_t end,
                   float* out, int64_t out_stride) {
  RowRange range(m, act, row, rows);
  for (int64_t panel = begin; panel < end; ++panel) range.panel(panel, out, out_stride, false);
}

void linear(Pool& pool, const PackedMatrix& m, const Activations& act, int64_t rows, float* out, int64_t out_stride,
            bool accumulate) {
  const int64_t panels = panels_of(m);
  const int64_t chunks = (rows + kRowChunk - 1) / kRowChunk;
  std::optional<RowRange> range;
  int64_t current = -1;
  pool.for_each(panels * chunks, [&](int64_t item) {
    const int64_t chunk = item / panels;
    if (chunk != current) {
      range.reset();  // before the next takes over the thread's tiles
      range.emplace(m, act, chunk * kRowChunk, std::min(kRowChunk, rows - chunk * kRowChunk));
      current = chunk;
    }
    range->panel(item % panels, out, out_stride, accumulate);
  });
}

}  // namespace gorgon
