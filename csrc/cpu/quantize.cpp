// quantize on the CPU in int8, as vitfast/ops/reference.py defines it: rows of x, or of its LayerNorm, with a scale for
// each. One pass over a row after the first has brought it into cache. Bound by memory.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "../guards.h"
#include "../ops.h"
#include "memory.h"
#include "numbers.h"
#include "row_moments.h"
#include "tile_epilogue.h"
#include "work.h"

namespace vitfast {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr const char* kOp = "quantize";
constexpr int64_t kRows = 16;  // that a thread takes at a time: worth waking for

template <typename scalar_t>
struct Rows {
  int8_t* values;
  float* scales;
  const scalar_t* x;
  const float *weight, *bias;  // of a norm, padded to whole vectors; null without one
  int64_t width;
  float eps;
};

// buffer [2, width rounded up to whole vectors].
template <Simd level, typename scalar_t>
VITFAST_INLINE void quantize_loop(const Rows<scalar_t>& rows, int64_t begin, int64_t end, float* buffer) {
  const int64_t n = rows.width;
  float* normed = buffer + (n + kWide - 1) / kWide * kWide;
  for (int64_t r = begin; r < end; ++r) {
    const scalar_t* x = rows.x + r * n;
    int8_t* values = rows.values + r * n;
    if (!rows.weight) {
      rows.scales[r] = quantize_row<level>(x, n, values);
      continue;
    }
    const float* row = widened<level>(x, n, buffer);
    const Moments moments = moments_of(row, n, rows.eps);
    Bits most{};
    for (int64_t i = 0; i < n; i += kWide) {  // weight and bias are 0 beyond the end
      const Floats weight = load_floats(rows.weight + i), bias = load_floats(rows.bias + i);
      const Floats value = (load_floats(row + i, n - i) - moments.mean) * moments.rstd * weight + bias;
      most = larger_magnitudes(most, value);
      store<kWide>(normed + i, value);
    }
    const Int8Scale scale(largest<kWide>(most));
    round_row<level>(normed, n, scale, values);
    rows.scales[r] = scale.scale;
  }
}

template <typename scalar_t>
using QuantizeRows = void (*)(const Rows<scalar_t>&, int64_t, int64_t, float*);

template <typename scalar_t>
void quantize_standard(const Rows<scalar_t>& rows, int64_t begin, int64_t end, float* buffer) {
  quantize_loop<Simd::standard>(rows, begin, end, buffer);
}

#ifdef VITFAST_SIMD_LEVELS
template <typename scalar_t>
VITFAST_TARGET("avx2,fma,f16c")
void quantize_avx2(const Rows<scalar_t>& rows, int64_t begin, int64_t end, float* buffer) {
  quantize_loop<Simd::avx2>(rows, begin, end, buffer);
}

template <typename scalar_t>
VITFAST_TARGET("avx512f,avx512bw,avx512vl")
void quantize_avx512(const Rows<scalar_t>& rows, int64_t begin, int64_t end, float* buffer) {
  quantize_loop<Simd::avx512>(rows, begin, end, buffer);
}
#endif

template <typename scalar_t>
QuantizeRows<scalar_t> quantize_here() {
#ifdef VITFAST_SIMD_LEVELS
  if (simd_level() >= Simd::avx512_vnni) return &quantize_avx512<scalar_t>;
  if (simd_level() >= Simd::avx2) return &quantize_avx2<scalar_t>;
#endif
  return &quantize_standard<scalar_t>;
}

template <typename scalar_t>
void run(const at::Tensor& values, const at::Tensor& scales, const at::Tensor& x, const Optional& weight,
         const Optional& bias, double eps) {
  // Copied if need be.
  const at::Tensor source = contiguous(kOp, "x", x);
  const Optional w = padded_columns(kOp, "norm_weight", weight), b = padded_columns(kOp, "norm_bias", bias);
  const Rows<scalar_t> rows{values.mutable_data_ptr<int8_t>(),
                            scales.mutable_data_ptr<float>(),
                            read<scalar_t>(kOp, "x", source),
                            read<float>(kOp, "norm_weight", w),
                            read<float>(kOp, "norm_bias", b),
                            x.size(-1),
                            static_cast<float>(eps)};
  const int64_t bytes = ((Size(kOp, x.size(-1)) + kWide) * 2 * sizeof(float)).value();
  share_out(rows_of(kOp, x), kRows, [&] {
    auto* buffer = static_cast<float*>(Scratch::of(bytes));
    return [&rows, buffer](int64_t begin, int64_t end) { quantize_here<scalar_t>()(rows, begin, end, buffer); };
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> quantize_cpu(const at::Tensor& x, const Optional& norm_weight,
                                                const Optional& norm_bias, double eps, at::ScalarType dtype) {
  check_dtype(kOp, "x", x, {at::kFloat, at::kHalf, at::kBFloat16});
  TORCH_CHECK_VALUE(dtype == at::kChar, kOp, ": dtype must be torch.int8 on the CPU, got ", dtype_text(dtype));
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, kOp, ": x must have a non-empty last axis, got shape ",
                    shape_text(x.sizes()));
  TORCH_CHECK_VALUE(norm_weight.has_value() == norm_bias.has_value(), kOp,
                    ": norm_weight and norm_bias go together; only one was given");
  check_shape(kOp, "norm_weight", norm_weight, {x.size(-1)});
  check_shape(kOp, "norm_bias", norm_bias, {x.size(-1)});
  if (norm_weight) {
    check_dtype(kOp, "norm_weight", *norm_weight, {x.scalar_type()});
    check_dtype(kOp, "norm_bias", *norm_bias, {x.scalar_type()});
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor values = empty_output(x.sizes(), x.options().dtype(at::kChar));
  const at::Tensor scales = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  if (x.numel() > 0) {
    auto* call = x.scalar_type() == at::kFloat ? &run<float> : &run<at::BFloat16>;
    if (x.scalar_type() == at::kHalf) call = &run<at::Half>;
    call(values, scales, x, norm_weight, norm_bias, eps);
  }
  return {values, scales};
}

}  // namespace vitfast
