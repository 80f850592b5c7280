#include "linear.h"

#include <algorithm>

#include "linear_ops.h"

namespace gorgon {
namespace {

// Rows whose activations stay in L2 while the panels pass by.
constexpr int64_t kRowChunk = 192;

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
  const float* channel_scales;
  const float* bias;
  float* out;
  int64_t out_stride;
  int64_t channels;  // left in the panel
  bool accumulate;
};

void finish(const Tile& t, F16 y, int row, int64_t channel) {
  const int64_t width = std::min<int64_t>(t.channels - channel, kLanes);
  if (width <= 0) return;
  if (t.bias) y = y + load(t.bias + channel);
  float* out = t.out + row * t.out_stride + channel;
  if (t.accumulate) y = load_n(out, static_cast<int>(width)) + y;
  store_n(out, y, static_cast<int>(width));
}

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
      for (int v = 0; v < Vectors; ++v) row[v] = row[v] * load(t.channel_scales + (first_vector + v) * kLanes);
  } else {
    run_steps<Op, Rows, Vectors>(t, 0, t.steps, w, sums);
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) finish(t, sums[r][v], r, (first_vector + v) * kLanes);
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
  const int64_t channel = panel * kPanel;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = row + rows * block / blocks;
    const int64_t count = row + rows * (block + 1) / blocks - first;
    const uint32_t* weights = m.data + panel * steps_of(m) * kPanel;
    const char* next = reinterpret_cast<const char*>(weights + steps_of(m) * kPanel);
    const Tile tile{act.words + first * act.stride,
                    act.stride,
                    act.scales + first * act.groups,
                    act.sums + first * act.groups,
                    act.groups,
                    weights,
                    next + block * steps_of(m) * 128 / blocks / 64 * 64,
                    blocks == 1 ? 128 : 64,
                    steps_of(m),
                    m.scales + channel,
                    m.has_bias ? m.bias + channel : nullptr,
                    out + first * out_stride + channel,
                    out_stride,
                    m.out_features - channel,
                    accumulate};
    dispatch<Op>(tile, static_cast<int>(count), std::make_integer_sequence<int, Op::kMaxRows>{});
  }
}

void linear_panel(const PackedMatrix& m, const Activations& act, int64_t row, int64_t rows, int64_t panel, float* out,
                  int64_t out_stride, bool accumulate) {
  if (m.kind == kFp32) panel_rows<Fp32Op>(m, act, row, rows, panel, out, out_stride, accumulate);
  else if (m.kind == kBf16) panel_rows<Bf16Op>(m, act, row, rows, panel, out, out_stride, accumulate);
  else panel_rows<Int8Op>(m, act, row, rows, panel, out, out_stride, accumulate);
}

}  // namespace

void prepare_row(int32_t kind, const float* x, int64_t in_features, const Activations& act, int64_t row) {
  uint32_t* words = act.words + row * act.stride;
  const int64_t n = in_features;
  if (kind == kFp32) {
    std::memcpy(words, x, n * sizeof(float));
  } else if (kind == kBf16) {
    for (int64_t i = 0; i < n; i += kLanes)
      store_bf16(reinterpret_cast<uint16_t*>(words) + i, load_n(x + i, static_cast<int>(std::min<int64_t>(n - i, 16))));
  } else {
    for (int64_t group = 0; group * kGroup < n; ++group) {
      const int64_t first = group * kGroup, end = std::min(first + kGroup, n);
      const auto values = [&](int64_t i) { return load_n(x + i, static_cast<int>(std::min<int64_t>(end - i, kLanes))); };
      F16 largest = set1(0.0f);
      for (int64_t i = first; i < end; i += kLanes) largest = max(largest, abs(values(i)));
      const float absmax = reduce_max(largest);
      const F16 inverse = set1(absmax > 0.0f ? 127.0f / absmax : 0.0f);
      F16 sum = set1(0.0f);
      for (int64_t i = first; i < end; i += kLanes)
        sum = sum + store_int8(reinterpret_cast<int8_t*>(words) + i, values(i) * inverse);
      act.scales[row * act.groups + group] = absmax / 127.0f;
      act.sums[row * act.groups + group] = static_cast<int32_t>(reduce_add(sum));  // small integers: exact
    }
  }
}

void linear(Pool& pool, const PackedMatrix& m, const Activations& act, int64_t rows, float* out, int64_t out_stride,
            bool accumulate) {
  const int64_t panels = panels_of(m);
  const int64_t chunks = (rows + kRowChunk - 1) / kRowChunk;
  pool.for_each(panels * chunks, [&](int64_t item) {
    const int64_t chunk = item / panels;
    const int64_t row = chunk * kRowChunk;
    linear_panel(m, act, row, std::min(kRowChunk, rows - row), item % panels, out, out_stride, accumulate);
  });
}

}  // namespace gorgon
