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
  const float* row_scales;
  const int32_t* row_sums;
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

// acc by value: a reference would make its address escape and push every accumulator of the loop to the stack.
template <typename Op>
void finish(const Tile& t, typename Op::Acc acc, int row, int64_t channel) {
  const int64_t width = std::min<int64_t>(t.channels - channel, kLanes);
  if (width <= 0) return;
  F16 y = Op::finish(acc, t.row_sums[row], t.row_scales[row], t.channel_scales + channel);
  if (t.bias) y = y + load(t.bias + channel);
  float* out = t.out + row * t.out_stride + channel;
  if (t.accumulate) y = load_n(out, static_cast<int>(width)) + y;
  store_n(out, y, static_cast<int>(width));
}

template <typename Op, int Rows, int Vectors>
void multiply(const Tile& t, int first_vector) {
  typename Op::Acc acc[Rows][Vectors];
  unrolled<Rows>([&](auto r) { unrolled<Vectors>([&](auto v) { acc[r][v] = Op::zero(); }); });

  // One base pointer for four rows: the x86 addressing modes reach the other three, so twelve rows fit the registers.
  const uint32_t* base[(Rows + 3) / 4];
  unrolled<(Rows + 3) / 4>([&](auto i) { base[i] = t.act + 4 * i * t.act_stride; });
  const int64_t stride = t.act_stride;
  const uint32_t* w = t.weights + first_vector * kLanes;
  const char* prefetch = t.prefetch;
  const int64_t advance = t.prefetch_bytes, second = advance / 2;
  for (int64_t s = 0; s < t.steps; ++s, w += 2 * kLanes, prefetch += advance) {
    __builtin_prefetch(prefetch, 0, 2);
    __builtin_prefetch(prefetch + second, 0, 2);
    typename Op::Weight weight[Vectors];
    unrolled<Vectors>([&](auto v) { weight[v] = Op::weight(w + v * kLanes); });
    unrolled<Rows>([&](auto r) {
      const typename Op::Act a = Op::act(base[r / 4] + (r % 4) * stride + s);
      unrolled<Vectors>([&](auto v) { Op::step(acc[r][v], weight[v], a); });
    });
  }
  unrolled<Rows>([&](auto r) {
    unrolled<Vectors>([&](auto v) { finish<Op>(t, acc[r][v], r, (first_vector + v) * kLanes); });
  });
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
                    act.scales + first,
                    act.sums + first,
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
    F16 largest = set1(0.0f);
    for (int64_t i = 0; i < n; i += kLanes)
      largest = max(largest, abs(load_n(x + i, static_cast<int>(std::min<int64_t>(n - i, 16)))));
    const float absmax = reduce_max(largest);
    const F16 inverse = set1(absmax > 0.0f ? 127.0f / absmax : 0.0f);
    F16 sum = set1(0.0f);
    for (int64_t i = 0; i < n; i += kLanes)
      sum = sum + store_int8(reinterpret_cast<int8_t*>(words) + i,
                             load_n(x + i, static_cast<int>(std::min<int64_t>(n - i, 16))) * inverse);
    act.scales[row] = absmax / 127.0f;
    act.sums[row] = static_cast<int32_t>(reduce_add(sum));  // integers below 2^24: exact
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
