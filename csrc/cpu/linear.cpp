// linear on the CPU: y = epilogue(x Wᵀ), as vitfast/ops/reference.py defines it: its arguments, and what they become
// for the product in fp32 (linear_fp32.cpp) or bf16 (linear_bf16.cpp).

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../guards.h"
#include "../ops.h"
#include "activation.h"
#include "linear_bf16.h"
#include "linear_fp32.h"
#include "memory.h"

namespace vitfast {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr const char* kOp = "linear";

int64_t tiles_of(int64_t columns) { return (Size(kOp, columns) + (kNarrowChunk - 1)).value() / kNarrowChunk; }

// Row statistics [M, tiles, 2] of x -> its mean and 1 / sqrt(variance + eps) [2, M] (Chan, Golub, LeVeque 1979).
at::Tensor combine_stats(const at::Tensor& row_stats, int64_t width, double eps) {
  const int64_t rows = row_stats.size(0), tiles = row_stats.size(1);
  const at::Tensor source = contiguous(kOp, "row_stats", row_stats);
  const at::Tensor combined = at::empty({2, rows}, row_stats.options());
  const float* pair = read<float>(kOp, "row_stats", source);
  float *means = combined.mutable_data_ptr<float>(), *rstds = means + rows;
  for (int64_t m = 0; m < rows; ++m, pair += 2 * tiles) {
    double sum = 0.0, square = 0.0;
    for (int64_t t = 0; t < tiles; ++t) {
      sum += static_cast<double>(pair[2 * t]) * static_cast<double>(std::min(kNarrowChunk, width - t * kNarrowChunk));
    }
    const double mean = sum / static_cast<double>(width);
    for (int64_t t = 0; t < tiles; ++t) {
      const double shift = pair[2 * t] - mean;
      square += pair[2 * t + 1] + static_cast<double>(std::min(kNarrowChunk, width - t * kNarrowChunk)) * shift * shift;
    }
    means[m] = static_cast<float>(mean);
    rstds[m] = static_cast<float>(1.0 / std::sqrt(square / static_cast<double>(width) + eps));
  }
  return combined;
}

void check(const at::Tensor& x, const at::Tensor& packed, const Optional& bias, const Optional& layer_scale,
           const Optional& residual, const Optional& row_stats, const Optional& weight_sum, Activation activation) {
  check_dtype(kOp, "x", x, {at::kFloat, at::kBFloat16});
  check_dtype(kOp, "weight", packed, {x.scalar_type()});
  const bool in_bf16 = x.scalar_type() == at::kBFloat16;
  if (in_bf16) {
    const std::string reason = why_no_linear_bf16_cpu();
    TORCH_CHECK_VALUE(reason.empty(), kOp, ": ", reason);
  }
  const int64_t k = x.dim() >= 1 ? x.size(-1) : 0;
  TORCH_CHECK_VALUE(packed.dim() == 2 && k >= 1 && packed.size(1) == (in_bf16 ? k + k % 2 : k), kOp,
                    ": x [..., K] and weight [N, K] with K >= 1", in_bf16 ? ", packed in pairs," : "",
                    " do not fit: ", shape_text(x.sizes()), " and ", shape_text(packed.sizes()));
  const int64_t n = packed.size(0);
  TORCH_CHECK_VALUE(packed.is_contiguous(), kOp, ": weight is not as pack_linear returned it: strides ",
                    shape_text(packed.strides()));
  check_shape(kOp, "bias", bias, {n});
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out_columns(kOp, activation, n);
  check_shape(kOp, "layer_scale", layer_scale, {shape.back()});
  check_shape(kOp, "residual", residual, shape);
  TORCH_CHECK_VALUE(row_stats.has_value() == weight_sum.has_value(), kOp,
                    ": row_stats and weight_sum go together (see fold_norm); only one was given");
  if (row_stats) {
    check_shape(kOp, "row_stats", row_stats, {rows_of(kOp, x), tiles_of(k), 2});
    check_shape(kOp, "weight_sum", weight_sum, {n});
  }
  const std::pair<const char*, const Optional&> named[] = {{"bias", bias},
                                                           {"layer_scale", layer_scale},
                                                           {"residual", residual},
                                                           {"row_stats", row_stats},
                                                           {"weight_sum", weight_sum}};
  for (const auto& [name, tensor] : named) {
    const bool of_norm = name == std::string("row_stats") || name == std::string("weight_sum");
    if (tensor) check_dtype(kOp, name, *tensor, {of_norm ? at::kFloat : x.scalar_type()});
  }
}

}  // namespace

at::Tensor pack_linear_cpu(const at::Tensor& weight) {
  constexpr const char* op = "pack_linear";
  check_dtype(op, "weight", weight, {at::kFloat, at::kBFloat16});
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight must be [N, K], got shape ", shape_text(weight.sizes()));
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor source = contiguous(op, "weight", weight);
  if (weight.scalar_type() == at::kFloat) {
    const at::Tensor packed = empty_weight(source.sizes(), source.options());
    pack_panels(source, packed.mutable_data_ptr<float>());
    return packed;
  }
  const at::Tensor packed =
      empty_weight({source.size(0), round_up(Size(op, source.size(1)), 2).value()}, source.options());
  pack_linear_bf16(source, packed);
  return packed;
}

std::vector<at::Tensor> linear_packed_cpu(const at::Tensor& x, const at::Tensor& packed, const Optional& bias,
                                          const std::optional<std::string>& activation, const Optional& layer_scale,
                                          const Optional& residual, const Optional& row_stats,
                                          const Optional& weight_sum, double eps, bool stats) {
  const Activation chosen = activation_named(kOp, activation);
  check(x, packed, bias, layer_scale, residual, row_stats, weight_sum, chosen);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t n = out_columns(kOp, chosen, packed.size(0)), k = x.size(-1), m = rows_of(kOp, x);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  std::vector<at::Tensor> result{empty_output(shape, x.options())};
  if (stats) result.push_back(at::empty({m, tiles_of(n), 2}, x.options().dtype(at::kFloat)));
  if (m == 0 || n == 0) return result;

  // Copied if need be; the name is what an error calls them.
  const at::Tensor rows = contiguous(kOp, "x", x, sizeof(int32_t));
  const Optional b = padded_columns(kOp, "bias", bias), scale = padded_columns(kOp, "layer_scale", layer_scale);
  const Optional added = contiguous(kOp, "residual", residual), sums = padded_columns(kOp, "weight_sum", weight_sum);
  const at::Tensor norm = row_stats ? combine_stats(*row_stats, k, eps) : at::Tensor();
  TileEpilogue epilogue;
  if (row_stats) {
    epilogue.mean = read<float>(kOp, "row_stats", norm);
    epilogue.rstd = epilogue.mean + m;
    epilogue.weight_sum = read<float>(kOp, "weight_sum", sums);
  }
  epilogue.bias = read<float>(kOp, "bias", b);
  epilogue.activation = chosen;
  epilogue.layer_scale = read<float>(kOp, "layer_scale", scale);
  epilogue.residual = read(kOp, "residual", added);
  epilogue.y = result[0].mutable_data_ptr();
  epilogue.stats = stats ? result[1].mutable_data_ptr<float>() : nullptr;
  epilogue.dtype = x.scalar_type(), epilogue.n = n, epilogue.up = packed.size(0) - n;
  (x.scalar_type() == at::kFloat ? &linear_fp32 : &linear_bf16)(rows, m, packed, epilogue);
  return result;
}

}  // namespace vitfast
