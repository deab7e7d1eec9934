// layer_norm and add_layer_norm on the CPU, as vitfast/ops/reference.py defines them.
//
// Bound by memory.

#include <ATen/TensorUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <cstdint>
#include <tuple>

#include "../checks.h"
#include "../guards.h"
#include "../ops.h"
#include "memory.h"
#include "row_moments.h"
#include "work.h"

namespace vitfast {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr int64_t kRows = 16;  // that a thread takes at a time: worth waking for

// Rows [M, C]; strides in elements.
template <typename scalar_t>
struct Rows {
  scalar_t *y, *total;  // contiguous; total and residual may be null
  const scalar_t *x, *residual, *weight, *bias;
  int64_t x_stride, residual_stride, width;
  float eps;
};

// level: of the function this is inlined into, as far as its own instructions read and round bf16.
template <Simd level, typename scalar_t>
VITFAST_INLINE void norm_loop(const Rows<scalar_t>& rows, int64_t begin, int64_t end, float* buffer) {
  const int64_t n = rows.width;
  for (int64_t r = begin; r < end; ++r) {
    const scalar_t* x = rows.x + r * rows.x_stride;
    if (rows.residual) {
      const scalar_t* residual = rows.residual + r * rows.residual_stride;
      scalar_t* total = rows.total + r * n;
      for (int64_t i = 0; i < n; ++i) {
        total[i] = static_cast<scalar_t>(static_cast<float>(x[i]) + static_cast<float>(residual[i]));
      }
      x = total;
    }
    const float* row = widened<level>(x, n, buffer);
    const auto [mean, rstd] = moments_of(row, n, rows.eps);
    scalar_t* y = rows.y + r * n;
    int64_t i = 0;
    for (; i + kWide <= n; i += kWide) {
      const Floats weight = load_floats<level>(rows.weight + i), bias = load_floats<level>(rows.bias + i);
      const Floats value = (load<kWide>(row + i) - mean) * rstd * weight + bias;
      if constexpr (level >= Simd::avx512_bf16) {
        store_by_instruction(y + i, value);
      } else {
        store_rounded(y + i, value);
      }
    }
    for (; i < n; ++i) {
      const float weight = static_cast<float>(rows.weight[i]), bias = static_cast<float>(rows.bias[i]);
      y[i] = static_cast<scalar_t>((row[i] - mean) * rstd * weight + bias);
    }
  }
}

VITFAST_SIMD void norm(const Rows<float>& rows, int64_t begin, int64_t end, float* buffer) {
  norm_loop<Simd::standard>(rows, begin, end, buffer);
}
VITFAST_SIMD void norm_rounding(const Rows<at::BFloat16>& rows, int64_t begin, int64_t end, float* buffer) {
  norm_loop<Simd::standard>(rows, begin, end, buffer);
}
#ifdef VITFAST_SIMD_LEVELS
VITFAST_TARGET("avx512f,avx512bw,avx512vl,avx512bf16")
void norm_by_instruction(const Rows<at::BFloat16>& rows, int64_t begin, int64_t end, float* buffer) {
  norm_loop<Simd::avx512_bf16>(rows, begin, end, buffer);
}
#endif
void norm(const Rows<at::BFloat16>& rows, int64_t begin, int64_t end, float* buffer) {
#ifdef VITFAST_SIMD_LEVELS
  if (simd_level() >= Simd::avx512_bf16) return norm_by_instruction(rows, begin, end, buffer);
#endif
  norm_rounding(rows, begin, end, buffer);
}

// The stride between the rows of x [..., C] seen as [M, C].
int64_t row_stride(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.size(-1) <= 1 || x.stride(-1) == 1, op, ": the last axis of ", name, " has stride ", x.stride(-1),
                    ", expected 1");
  if (x.numel() == 0) return 0;
  const int64_t rows[] = {rows_of(op, x), x.size(-1)};
  const auto strides = at::detail::computeStride(x.sizes(), x.strides(), at::IntArrayRef(rows));
  TORCH_CHECK_VALUE(strides, op, ": ", name, " with shape ", shape_text(x.sizes()), " and strides ",
                    shape_text(x.strides()), " cannot be viewed as rows");
  return (*strides)[0];
}

void check(const char* op, const at::Tensor& x, const Optional& residual, const at::Tensor& weight,
           const at::Tensor& bias) {
  check_dtype(op, "x", x, {at::kFloat, at::kBFloat16});
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, op, ": x must have a non-empty last axis, got shape ",
                    shape_text(x.sizes()));
  check_shape(op, "weight", weight, {x.size(-1)});
  check_shape(op, "bias", bias, {x.size(-1)});
  check_shape(op, "residual", residual, x.sizes());
  check_dtype(op, "weight", weight, {x.scalar_type()});
  check_dtype(op, "bias", bias, {x.scalar_type()});
  if (residual) check_dtype(op, "residual", *residual, {x.scalar_type()});
}

template <typename scalar_t>
void run(const char* op, const at::Tensor& y, const Optional& total, const at::Tensor& x, const Optional& residual,
         const at::Tensor& weight, const at::Tensor& bias, double eps, int64_t x_stride, int64_t residual_stride) {
  // Copied if need be: they are small.
  const at::Tensor w = contiguous(op, "weight", weight), b = contiguous(op, "bias", bias);
  const Rows<scalar_t> rows{y.mutable_data_ptr<scalar_t>(),
                            total ? total->mutable_data_ptr<scalar_t>() : nullptr,
                            read<scalar_t>(op, "x", x),
                            read<scalar_t>(op, "residual", residual),
                            read<scalar_t>(op, "weight", w),
                            read<scalar_t>(op, "bias", b),
                            x_stride,
                            residual_stride,
                            x.size(-1),
                            static_cast<float>(eps)};
  share_out(rows_of(op, x), kRows, [&] {
    auto* buffer = static_cast<float*>(Scratch::of((Size(op, rows.width) * sizeof(float)).value()));
    return [&rows, buffer](int64_t begin, int64_t end) { norm(rows, begin, end, buffer); };
  });
}

std::tuple<at::Tensor, Optional> norm(const char* op, const at::Tensor& x, const Optional& residual,
                                      const at::Tensor& weight, const at::Tensor& bias, double eps) {
  check(op, x, residual, weight, bias);
  const int64_t x_stride = row_stride(op, "x", x),
                residual_stride = residual ? row_stride(op, "residual", *residual) : 0;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor y = empty_output(x.sizes(), x.options());
  const Optional total = residual ? Optional(empty_output(x.sizes(), x.options())) : Optional();
  if (x.numel() > 0) {
    auto* call = x.scalar_type() == at::kFloat ? &run<float> : &run<at::BFloat16>;
    call(op, y, total, x, residual, weight, bias, eps, x_stride, residual_stride);
  }
  return {y, total};
}

}  // namespace

at::Tensor layer_norm_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  return std::get<0>(norm("layer_norm", x, std::nullopt, weight, bias, eps));
}

std::tuple<at::Tensor, at::Tensor> add_layer_norm_cpu(const at::Tensor& x, const at::Tensor& residual,
                                                      const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const auto [y, total] = norm("add_layer_norm", x, residual, weight, bias, eps);
  return {y, *total};
}

}  // namespace vitfast
