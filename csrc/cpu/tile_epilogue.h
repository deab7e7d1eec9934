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
#include "narrow_tile.h"

namespace vitfast {

// A null pointer leaves its part out. What there is a number of for each column is fp32, and padded to whole panels.
struct TileEpilogue {
  const float* weight_scale = nullptr;                                  // [N]
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
  int64_t n = 0;

  int64_t chunks() const { return (n + kNarrowChunk - 1) / kNarrowChunk; }
};

// A number for each column, as TileEpilogue wants it.
inline at::Tensor padded_columns(const char* op, const char* name, const at::Tensor& columns) {
  const int64_t n = columns.size(0);
  const at::Tensor whole = contiguous(op, name, columns);
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

// One row of a chunk, whose columns begin at `first`: `sums` [kNarrowChunk], which are changed, to row m of y.
template <typename scalar_t>
VITFAST_INLINE void finish_row(const TileEpilogue& e, int64_t m, int64_t first, float* sums) {
  const int64_t width = std::min(kNarrowChunk, e.n - first);
  const scalar_t* residual = e.residual ? static_cast<const scalar_t*>(e.residual) + m * e.n + first : nullptr;
  const bool rough = !e.values && std::is_same_v<scalar_t, at::BFloat16>;  // scales are fp32
  scalar_t* y = e.values ? nullptr : static_cast<scalar_t*>(e.y) + m * e.n + first;
  for (int64_t i = 0; i < width; i += kWide) {
    const int64_t n = first + i;
    Floats value = load_floats(sums + i);
    if (e.weight_scale) value *= load_floats(e.weight_scale + n);
    if (e.rstd) value = e.rstd[m] * (value - e.mean[m] * load_floats(e.weight_sum + n));
    if (e.bias) value += load_floats(e.bias + n);
    value =
        rough && e.activation == Activation::kGelu ? rough_gelu<kWide>(value) : activate<kWide>(e.activation, value);
    if (e.layer_scale) value *= load_floats(e.layer_scale + n);
    if (residual) value += load_floats(residual + i, width - i);
    if (y) value = store_rounded(y + i, value, width - i);
    if (e.values || e.stats) store<kWide>(sums + i, value);
  }
  const int64_t at = m * e.chunks() + first / kNarrowChunk;
  if (e.values) e.scales[at] = quantize_row(sums, width, e.values + m * e.n + first);
  if (e.stats) chunk_stats(sums, width, e.stats + 2 * at);
}

}  // namespace vitfast
