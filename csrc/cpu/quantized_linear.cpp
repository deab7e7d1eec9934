// quantized_linear on the CPU in int8, as vitfast/ops/reference.py defines it, where there is AVX-512 VNNI or AVX2.
//
// `vpdpbusd` multiplies bytes without sign with bytes that have one. The weight is packed with 128 added, and what that
// adds to the product of a row of x is 128 times the row's sum, which the sums start with, negative. They are exact;
// with a scale for each group of columns of x, each group's are. In AVX2 (int8_avx2.h) all of this is the same.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../guards.h"
#include "../ops.h"
#include "int8_avx2.h"
#include "memory.h"
#include "narrow_product.h"

namespace vitfast {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr const char* kOp = "quantized_linear";
constexpr int64_t kGroups[] = {128, 64};  // columns of x that may share a scale: SCALE_GROUPS of the reference

#ifdef VITFAST_SIMD_LEVELS
#define VITFAST_VNNI VITFAST_TARGET("avx512f,avx512bw,avx512vl,avx512vnni")
#define VITFAST_VNNI_BF16 VITFAST_TARGET("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")
#define VITFAST_AVX2 VITFAST_TARGET("avx2,fma")

// f of how sums are stored.
template <typename Function>
VITFAST_INLINE void visit_store(const NarrowTile& t, bool adds, const Function& f) {
  if (adds) return f(StoreSums<true>{t.sums, t.scale, t.scale_stride});
  f(StoreSums<false>{t.sums, t.scale, t.scale_stride});
}

VITFAST_VNNI void multiply(const NarrowTile& t, const Ahead& ahead, bool adds) {
  t.x.visit([&](const auto& from) VITFAST_INLINE_LAMBDA {
    visit_store(t, adds, [&](const auto& sink) VITFAST_INLINE_LAMBDA {
      multiply_tile_rows<Int8Fours>(t.count, from, t.panel, t.words, t.start, ahead, sink);
    });
  });
}

// -128 times the sum of each group of columns of each row.
VITFAST_INLINE void sum_groups(const NarrowCall& c, const char* x, int64_t count, int32_t* start) {
  for (int64_t g = 0; g < c.groups(); ++g, start += kTileStride) {
    const int64_t k_end = std::min((g + 1) * 4 * c.group, c.row_bytes);
    for (int64_t i = 0; i < count; ++i) {
      int32_t total = 0;
      for (int64_t k = g * 4 * c.group; k < k_end; ++k) total += static_cast<int8_t>(x[i * c.row_bytes + k]);
      start[i] = -128 * total;
    }
  }
}

VITFAST_VNNI void start_sums(const NarrowCall& c, const char* x, int64_t count, int32_t* start) {
  constexpr int64_t kBytes = 4 * kWide;
  if (c.groups() > 1 || c.row_bytes % kBytes) return sum_groups(c, x, count, start);
  const Words ones = Words{} + 0x01010101;
  for (int64_t i = 0; i < count; ++i, x += c.row_bytes) {
    Words total{};
    for (int64_t k = 0; k < c.row_bytes; k += kBytes) total = Int8Fours::add(total, load_words(x + k), ones);
    int32_t lanes[kWide], sum = 0;
    std::memcpy(lanes, &total, sizeof(lanes));
    for (int32_t lane : lanes) sum += lane;
    start[i] = -128 * sum;
  }
}

template <typename scalar_t>
VITFAST_VNNI void finish(const TileEpilogue& e, int64_t m, int64_t count, int64_t first, float* sums) {
  finish_rows<scalar_t, Simd::avx512_vnni>(e, m, count, first, sums);
}

VITFAST_VNNI_BF16 void finish_bf16(const TileEpilogue& e, int64_t m, int64_t count, int64_t first, float* sums) {
  finish_rows<at::BFloat16, Simd::avx512_bf16>(e, m, count, first, sums);
}

VITFAST_AVX2 void multiply_avx2(const NarrowTile& t, const Ahead& ahead, bool adds) {
  Ahead asks = ahead;
  for (int64_t k = 0; k < std::min(Ahead::kRun, ahead.steps()); ++k) asks.ask();
  visit_store(t, adds, [&](const auto& sink) VITFAST_INLINE_LAMBDA {
    multiply_tile_rows_avx2(t.count, t.x.words, t.panel, t.words, t.start, sink);
  });
}

VITFAST_AVX2 void start_sums_avx2(const NarrowCall& c, const char* x, int64_t count, int32_t* start) {
  sum_groups(c, x, count, start);
}

template <typename scalar_t>
VITFAST_AVX2 void finish_avx2(const TileEpilogue& e, int64_t m, int64_t count, int64_t first, float* sums) {
  finish_rows<scalar_t, Simd::avx2>(e, m, count, first, sums);
}
#endif

void run(const NarrowCall& call) {
#ifdef VITFAST_SIMD_LEVELS
  if (simd_level() < Simd::avx512_vnni) {
    auto* finish_in = &finish_avx2<float>;
    if (call.epilogue.dtype == at::kHalf) finish_in = &finish_avx2<at::Half>;
    if (call.epilogue.dtype == at::kBFloat16) finish_in = &finish_avx2<at::BFloat16>;
    return run_narrow(call, {&start_sums_avx2, &multiply_avx2, finish_in, false});
  }
  auto* finish_in = &finish<float>;
  if (call.epilogue.dtype == at::kHalf) finish_in = &finish<at::Half>;
  if (call.epilogue.dtype == at::kBFloat16) {
    finish_in = simd_level() < Simd::avx512_bf16 ? &finish<at::BFloat16> : &finish_bf16;
  }
  run_narrow(call, {&start_sums, &multiply, finish_in, true});
#endif
}

int64_t group_of(const at::Tensor& x, const at::Tensor& x_scale) {
  if (x_scale.dim() != x.dim()) return x.size(-1);
  for (int64_t group : kGroups) {
    if ((x.size(-1) + group - 1) / group == x_scale.size(-1)) return group;
  }
  TORCH_CHECK_VALUE(false, kOp, ": x_scale has shape ", shape_text(x_scale.sizes()), " for x of shape ",
                    shape_text(x.sizes()), "; its columns share a scale, or each 128 of them, or each 64");
}

void check(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& packed, const at::Tensor& weight_scale,
           const Optional& bias, const Optional& layer_scale, const Optional& residual, at::ScalarType dtype,
           int64_t columns) {
  const std::string reason = why_no_quantized_linear_cpu();
  TORCH_CHECK_VALUE(reason.empty(), kOp, ": ", reason);
  check_dtype(kOp, "x", x, {at::kChar});
  check_dtype(kOp, "weight", packed, {at::kChar});
  check_dtype(kOp, "x_scale", x_scale, {at::kFloat});
  check_dtype(kOp, "weight_scale", weight_scale, {at::kFloat});
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, kOp,
                    ": dtype must be one of torch.float32, torch.float16, torch.bfloat16, got ", dtype_text(dtype));
  TORCH_CHECK_VALUE(packed.dim() == 2 && x.dim() >= 1 && x.size(-1) >= 1 && x.size(-1) <= kQuantizedLinearMaxInner &&
                        packed.size(1) == (x.size(-1) + 3) / 4 * 4,
                    kOp, ": x [..., K] and packed weight [N, K rounded up to fours], with K from 1 to ",
                    kQuantizedLinearMaxInner, ", do not fit: ", shape_text(x.sizes()), " and ",
                    shape_text(packed.sizes()));
  TORCH_CHECK_VALUE(packed.is_contiguous(), kOp, ": weight is not as pack_quantized_linear returned it: strides ",
                    shape_text(packed.strides()));
  const int64_t n = packed.size(0), group = group_of(x, x_scale);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = (x.size(-1) + group - 1) / group;
  if (x_scale.dim() != x.dim()) shape.pop_back();
  check_shape(kOp, "x_scale", x_scale, shape);
  check_shape(kOp, "weight_scale", weight_scale, {n});
  check_shape(kOp, "bias", bias, {n});
  check_shape(kOp, "layer_scale", layer_scale, {columns});
  shape = x.sizes().vec();
  shape.back() = columns;
  check_shape(kOp, "residual", residual, shape);
  const std::pair<const char*, const Optional&> in_dtype[] = {
      {"bias", bias}, {"layer_scale", layer_scale}, {"residual", residual}};
  for (const auto& [name, tensor] : in_dtype) {
    if (tensor) check_dtype(kOp, name, *tensor, {dtype});
  }
}

}  // namespace

std::string why_no_quantized_linear_cpu() { return simd_level() < Simd::avx2 ? "there is no AVX2 here" : ""; }

at::Tensor pack_quantized_linear_cpu(const at::Tensor& weight) {
  constexpr const char* op = "pack_quantized_linear";
  check_dtype(op, "weight", weight, {at::kChar});
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight must be [N, K], got shape ", shape_text(weight.sizes()));
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t n = weight.size(0), k = weight.size(1), padded = round_up(Size(op, k), 4).value();
  const at::Tensor source = contiguous(op, "weight", weight);
  const at::Tensor packed = empty_weight({n, padded}, weight.options());
  if (weight.numel() == 0) return packed;
  pack_narrow(reinterpret_cast<const char*>(read<int8_t>(op, "weight", source)), n, k, 0x80808080u,
              reinterpret_cast<char*>(packed.mutable_data_ptr<int8_t>()));
  return packed;
}

std::vector<at::Tensor> quantized_linear_packed_cpu(const at::Tensor& x, const at::Tensor& x_scale,
                                                    const at::Tensor& packed, const at::Tensor& weight_scale,
                                                    const Optional& bias, const std::optional<std::string>& activation,
                                                    const Optional& layer_scale, const Optional& residual,
                                                    at::ScalarType dtype, bool requantize) {
  const Activation chosen = activation_named(kOp, activation);
  const int64_t n = packed.dim() == 2 ? out_columns(kOp, chosen, packed.size(0)) : 0;
  check(x, x_scale, packed, weight_scale, bias, layer_scale, residual, dtype, n);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t m = rows_of(kOp, x);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  std::vector<at::Tensor> result{empty_output(shape, x.options().dtype(requantize ? at::kChar : dtype))};
  if (requantize) {
    shape.back() = (Size(kOp, n) + (kNarrowChunk - 1)).value() / kNarrowChunk;
    result.push_back(at::empty(shape, x_scale.options()));
  }
  if (m == 0 || n == 0) return result;

  // Copied if need be; the name is what an error calls them.
  const at::Tensor rows = contiguous(kOp, "x", x, sizeof(int32_t)), scales = contiguous(kOp, "x_scale", x_scale);
  const at::Tensor columns = padded_columns(kOp, "weight_scale", weight_scale);
  const Optional b = padded_columns(kOp, "bias", bias), scale = padded_columns(kOp, "layer_scale", layer_scale);
  const Optional added = contiguous(kOp, "residual", residual);
  TileEpilogue epilogue;
  epilogue.weight_scale = read<float>(kOp, "weight_scale", columns);
  epilogue.bias = read<float>(kOp, "bias", b);
  epilogue.activation = chosen;
  epilogue.layer_scale = read<float>(kOp, "layer_scale", scale);
  epilogue.residual = read(kOp, "residual", added);
  if (requantize) {
    epilogue.values = result[0].mutable_data_ptr<int8_t>();
    epilogue.scales = result[1].mutable_data_ptr<float>();
  } else {
    epilogue.y = result[0].mutable_data_ptr();
  }
  epilogue.dtype = dtype, epilogue.n = n, epilogue.up = packed.size(0) - n;
  run({kOp, m, n, x.size(-1), static_cast<const char*>(read(kOp, "x", rows)),
       static_cast<const char*>(read(kOp, "weight", packed)), (group_of(x, x_scale) + 3) / 4,
       read<float>(kOp, "x_scale", scales), epilogue});
  return result;
}

}  // namespace vitfast
