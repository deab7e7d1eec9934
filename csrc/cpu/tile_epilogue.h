// What is done to a product of narrow_product.h on its way to y: the epilogues of linear and quantized_linear.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "../guards.h"
#include "activation.h"
#include "gelu_table.h"
#include "narrow_tile.h"
#include "shares.h"

namespace vitfast {

constexpr int64_t kLine = 64;  // bytes of a cache line

// A null pointer leaves its part out. What there is a number of for each column is fp32, and padded to whole panels.
struct TileEpilogue {
  const float* weight_scale = nullptr;                                  // [N], of the weight, as bias and weight_sum
  const float *mean = nullptr, *rstd = nullptr, *weight_sum = nullptr;  // [M], [M], [N]: LayerNorm of x, folded
  const float* bias = nullptr;                                          // [N]
  Activation activation = Activation::kNone;
  const float* layer_scale = nullptr;            // [N]
  const void* residual = nullptr;                // [M, N] in y's dtype
  void* y = nullptr;                             // [M, N]
  float* stats = nullptr;                        // [M, chunks, 2]
  int8_t* values = nullptr;                      // [M, N], instead of y, with
  float* scales = nullptr;                       // [M, chunks]
  at::ScalarType dtype = at::ScalarType::Float;  // of y and residual
  int64_t n = 0;                                 // columns of y
  int64_t up = 0;  // swiglu: column of the product where the up projection begins, n; else 0

  int64_t chunks() const { return (n + kNarrowChunk - 1) / kNarrowChunk; }
  int64_t element_bytes() const { return dtype == at::kFloat ? 4 : 2; }
  int64_t y_bytes() const { return values ? 1 : element_bytes(); }
  const char* y_at(int64_t row, int64_t column) const {
    return (values ? reinterpret_cast<const char*>(values) : static_cast<const char*>(y)) +
           (row * n + column) * y_bytes();
  }
  const char* residual_at(int64_t row, int64_t column) const {
    return static_cast<const char*>(residual) + (row * n + column) * element_bytes();
  }
};

// Asks for columns [first, end) of row m of y and of residual.
VITFAST_INLINE void prefetch_outputs(const TileEpilogue& e, int64_t m, int64_t first, int64_t end) {
  const char *y = e.y_at(m, first), *y_end = e.y_at(m, end);
  for (; y < y_end; y += kLine) __builtin_prefetch(y, 1);
  if (!e.residual) return;
  const char *residual = e.residual_at(m, first), *residual_end = e.residual_at(m, end);
  for (; residual < residual_end; residual += kLine) __builtin_prefetch(residual);
}

// What a product asks for in its first steps, a line of each a step, as it is far away when it is wanted: a panel of
// columns of y and of residual, and something that comes later.
class Ahead {
 public:
  static constexpr int64_t kRun = 16;  // steps, at least as many as a tile has rows

  // Of rows m and on, and columns `first` and on.
  Ahead(const TileEpilogue& e, int64_t m, int64_t first)
      : y_(e.y_at(m, first)),
        row_(e.y_at(m + 1, first) - y_),
        residual_(e.residual ? e.residual_at(m, first) - y_ : 0),
        later_(y_),
        steps_(kRun * std::max<int64_t>(1, kNarrowPanel * e.y_bytes() / kLine)) {}

  // Nothing: `near` is at hand.
  explicit Ahead(const void* near) : y_(static_cast<const char*>(near)), row_(0), residual_(0), later_(y_), steps_(0) {}

  // What comes later: `bytes` a step, in `steps`.
  void and_later(const void* later, int64_t bytes, int64_t steps) {
    later_ = static_cast<const char*>(later), later_step_ = bytes, steps_ = std::max(steps_, steps);
  }

  int64_t steps() const { return steps_; }

  // After so many steps, a multiple of kRun.
  VITFAST_INLINE Ahead after(int64_t steps) const {
    Ahead there = *this;
    there.y_ += steps / kRun % kLines * kLine;
    there.later_ += steps * later_step_;
    there.steps_ -= steps;
    return there;
  }
  VITFAST_INLINE void ask() {
    __builtin_prefetch(y_, 1);
    __builtin_prefetch(y_ + residual_);
    __builtin_prefetch(later_, 0, 2);
    y_ += row_, later_ += later_step_;
  }

 private:
  static constexpr int64_t kLines = 2;  // of a panel of a row, at most
  const char* y_;
  int64_t row_, residual_;
  const char* later_;
  int64_t later_step_ = 0, steps_;
};

// A number for each column, as TileEpilogue wants it; copied if need be.
inline at::Tensor padded_columns(const char* op, const char* name, const at::Tensor& columns) {
  const int64_t n = columns.size(0);
  const at::Tensor whole = contiguous(op, name, columns);
  if (whole.scalar_type() == at::kFloat && n % kNarrowPanel == 0) return whole;
  const at::Tensor padded = at::empty({round_up(Size(op, n), kNarrowPanel).value()}, at::kFloat);
  float* to = padded.mutable_data_ptr<float>();
  std::fill(to + n, to + padded.size(0), 0.0f);
  switch (whole.scalar_type()) {
    case at::kFloat:
      std::copy_n(read<float>(op, name, whole), n, to);
      break;
    case at::kHalf:
      std::copy_n(read<at::Half>(op, name, whole), n, to);
      break;
    default:
      std::copy_n(read<at::BFloat16>(op, name, whole), n, to);
  }
  return padded;
}
inline std::optional<at::Tensor> padded_columns(const char* op, const char* name,
                                                const std::optional<at::Tensor>& columns) {
  return columns ? std::optional<at::Tensor>(padded_columns(op, name, *columns)) : std::nullopt;
}

// (mean, sum of squared deviations) of a row [n].
VITFAST_INLINE void chunk_stats(const float* row, int64_t n, float* stats) {
  Floats total{}, squares{};
  for (int64_t i = 0; i < n; i += kWide) total += load_floats(row + i, n - i);
  const float mean = sum<kWide>(total) / static_cast<float>(n);
  for (int64_t i = 0; i < n; i += kWide) {
    const Floats distance = load_floats(row + i, n - i, mean) - mean;
    squares += distance * distance;
  }
  stats[0] = mean;
  stats[1] = sum<kWide>(squares);
}

// f of each of some vectors. They stay in registers, and the steps of one are under way with those of the others.
template <int vectors, typename Function>
VITFAST_INLINE void each(Floats (&x)[vectors], const Function& f) {
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j) x[j] = f(x[j], j * kWide);
}

// rough: to fewer digits than fp32 has, where that costs less.
template <Simd level, bool rough, int vectors>
VITFAST_INLINE void activate_each(Activation activation, Floats (&x)[vectors]) {
  switch (activation) {
    case Activation::kGelu:
      return each(x, [](const Floats& v, int) VITFAST_INLINE_LAMBDA {
#ifdef VITFAST_SIMD_LEVELS
        if constexpr (level >= Simd::avx512 && rough) return gelu_by_table(v, kRoughGelu);
        if constexpr (level >= Simd::avx512) return gelu_by_table(v, kGelu);
#endif
        return gelu<kWide>(v);
      });
    case Activation::kGeluTanh:
      return each(x, [](const Floats& v, int) VITFAST_INLINE_LAMBDA { return gelu_tanh<kWide>(v); });
    case Activation::kQuickGelu:
      return each(x, [](const Floats& v, int) VITFAST_INLINE_LAMBDA { return quick_gelu<kWide>(v); });
    case Activation::kSilu:
      return each(x, [](const Floats& v, int) VITFAST_INLINE_LAMBDA { return silu<kWide>(v); });
    case Activation::kSwiglu:
    case Activation::kNone:
      return;
  }
}

constexpr int64_t kUpSums =
    kTileRows * kNarrowChunk;  // where the sums of the up projection are, after those of the gate

// Some vectors of a row of the product, from its column n on: sums -> what is activated.
template <int vectors>
VITFAST_INLINE void finish_product(const TileEpilogue& e, int64_t m, int64_t n, const float* sums,
                                   Floats (&value)[vectors]) {
  each(value, [&](const Floats&, int j) VITFAST_INLINE_LAMBDA { return load_floats(sums + j); });
  if (e.weight_scale)
    each(value, [&](const Floats& v, int j) VITFAST_INLINE_LAMBDA { return v * load_floats(e.weight_scale + n + j); });
  if (e.rstd) {
    const float mean = e.mean[m], rstd = e.rstd[m];
    each(value, [&](const Floats& v, int j)
                    VITFAST_INLINE_LAMBDA { return rstd * (v - mean * load_floats(e.weight_sum + n + j)); });
  }
  if (e.bias)
    each(value, [&](const Floats& v, int j) VITFAST_INLINE_LAMBDA { return v + load_floats(e.bias + n + j); });
}

// Some vectors of a row of a chunk, from its column i on: sums -> what goes to y, or to be quantised, not yet rounded.
template <typename scalar_t, Simd level, int vectors>
VITFAST_INLINE void finish_vectors(const TileEpilogue& e, int64_t m, int64_t first, int64_t i, const float* sums,
                                   Floats (&value)[vectors]) {
  const int64_t n = first + i, width = std::min(kNarrowChunk, e.n - first) - i;
  finish_product(e, m, n, sums + i, value);
  if (e.up) {
    Floats up[vectors];
    finish_product(e, m, n + e.up, sums + kUpSums + i, up);
    each(value, [&](const Floats& v, int j) VITFAST_INLINE_LAMBDA { return gated<kWide>(v, up[j / kWide]); });
  } else {
    activate_each<level, !std::is_same_v<scalar_t, float>>(e.activation, value);
  }
  if (e.layer_scale)
    each(value, [&](const Floats& v, int j) VITFAST_INLINE_LAMBDA { return v * load_floats(e.layer_scale + n + j); });
  if (e.residual) {
    const scalar_t* residual = static_cast<const scalar_t*>(e.residual) + m * e.n + n;
    each(value, [&](const Floats& v, int j) VITFAST_INLINE_LAMBDA {
      return v + (vectors > 1 ? load_floats<level>(residual + j) : load_floats<level>(residual, width));
    });
  }
}

// A whole row of a chunk of so many vectors, from register to memory.
template <typename scalar_t, Simd level, int vectors>
VITFAST_INLINE void finish_whole_row(const TileEpilogue& e, int64_t m, int64_t first, float* sums) {
  constexpr bool instruction = std::is_same_v<scalar_t, at::BFloat16> && level >= Simd::avx512_bf16;
  Floats value[vectors];
  finish_vectors<scalar_t, level>(e, m, first, 0, sums, value);
  const int64_t at = m * e.chunks() + first / kNarrowChunk;
  if (e.values) {
    Bits most{};
    each(value, [&](const Floats& v, int) VITFAST_INLINE_LAMBDA { return most = larger_magnitudes(most, v), v; });
    const Int8Scale scale(largest<kWide>(most));
    e.scales[at] = scale.scale;
    int8_t* values = e.values + m * e.n + first;
    each(value, [&](const Floats& v, int j) VITFAST_INLINE_LAMBDA {
      const Bytes bytes = scale.rounded<level>(v);
      std::memcpy(values + j, &bytes, sizeof(bytes));
      return v;
    });
    return;
  }
  scalar_t* y = static_cast<scalar_t*>(e.y) + m * e.n + first;
  each(value, [&](const Floats& v, int j) VITFAST_INLINE_LAMBDA {
    if constexpr (instruction) {
      store_by_instruction(y + j, v);
    } else {
      store_rounded(y + j, v);
    }
    return v;
  });
  if (!e.stats) return;
  for (int64_t j = 0; j < vectors * kWide; j += kWide) store<kWide>(sums + j, load_floats<level>(y + j));
  chunk_stats(sums, vectors * kWide, e.stats + 2 * at);
}

// One row of a chunk, whose columns begin at `first`: `sums` [kNarrowChunk], which are changed, to row m of y. level:
// of the function this is inlined into; it says how y is rounded to bf16, and GELU computed.
template <typename scalar_t, Simd level>
VITFAST_INLINE void finish_row(const TileEpilogue& e, int64_t m, int64_t first, float* sums) {
  constexpr int kVectors = kNarrowChunk / kWide;
  const int64_t width = std::min(kNarrowChunk, e.n - first);
  if (width == kNarrowChunk) return finish_whole_row<scalar_t, level, kVectors>(e, m, first, sums);
  if (width == kNarrowChunk / 2) return finish_whole_row<scalar_t, level, kVectors / 2>(e, m, first, sums);
  scalar_t* y = e.values ? nullptr : static_cast<scalar_t*>(e.y) + m * e.n + first;
  for (int64_t i = 0; i < width; i += kWide) {
    Floats value[1];
    finish_vectors<scalar_t, level>(e, m, first, i, sums, value);
    if (y) value[0] = store_rounded(y + i, value[0], width - i);
    store<kWide>(sums + i, value[0]);
  }
  const int64_t at = m * e.chunks() + first / kNarrowChunk;
  if (e.values) e.scales[at] = quantize_row<level>(sums, width, e.values + m * e.n + first);
  if (e.stats) chunk_stats(sums, width, e.stats + 2 * at);
}

// Rows [m, m + count) of a chunk likewise.
template <typename scalar_t, Simd level>
VITFAST_INLINE void finish_rows(const TileEpilogue& e, int64_t m, int64_t count, int64_t first, float* sums) {
  const int64_t end = std::min(first + kNarrowChunk, e.n);
  for (int64_t i = 0; i < count; ++i, sums += kNarrowChunk) {
    if (i + 2 < count) prefetch_outputs(e, m + i + 2, first, end);  // by now it left the first cache
    finish_row<scalar_t, level>(e, m + i, first, sums);
  }
}

}  // namespace vitfast
