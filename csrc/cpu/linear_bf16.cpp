// The product of linear in bf16 on the CPU, where there is AVX512-BF16. `vdpbf16ps` takes denormals for zero and rounds
// each sum of two products to fp32; K of them leave less than a thousandth of what rounding the result to bf16 does.

#include "linear_bf16.h"

#include <ATen/ops/empty.h>

#include <cstdint>

#include "../guards.h"
#include "narrow_product.h"

namespace vitfast {
namespace {

constexpr const char* kOp = "linear";

#ifdef VITFAST_SIMD_LEVELS
#define VITFAST_BF16 VITFAST_TARGET("avx512f,avx512bw,avx512vl,avx512bf16")

VITFAST_BF16 void multiply(const NarrowTile& t, const Ahead& ahead, bool) {
  t.x.visit([&](const auto& from) VITFAST_INLINE_LAMBDA {
    multiply_tile_rows<Bfloat16Pairs>(t.count, from, t.panel, t.words, t.start, ahead, StoreSums<>{t.sums});
  });
}

template <typename scalar_t>
VITFAST_BF16 void finish(const TileEpilogue& e, int64_t m, int64_t count, int64_t first, float* sums) {
  finish_rows<scalar_t, Simd::avx512_bf16>(e, m, count, first, sums);
}

NarrowCall call_of(const void* x, int64_t m, int64_t k, const void* packed, const TileEpilogue& epilogue) {
  return {kOp,         m,       epilogue.n, 2 * k, static_cast<const char*>(x), static_cast<const char*>(packed),
          (k + 1) / 2, nullptr, epilogue};
}
#endif

}  // namespace

std::string why_no_linear_bf16_cpu() { return simd_level() < Simd::avx512_bf16 ? "there is no AVX512-BF16 here" : ""; }

void pack_linear_bf16(const at::Tensor& weight, const at::Tensor& packed) {
  if (weight.numel() == 0) return;
  pack_narrow(static_cast<const char*>(read("pack_linear", "weight", weight)), weight.size(0), 2 * weight.size(1), 0,
              static_cast<char*>(packed.mutable_data_ptr()));
}

void linear_bf16(const at::Tensor& x, int64_t m, const at::Tensor& packed, const TileEpilogue& epilogue) {
#ifdef VITFAST_SIMD_LEVELS
  run_narrow(call_of(read(kOp, "x", x), m, x.size(-1), read(kOp, "weight", packed), epilogue),
             {nullptr, &multiply, &finish<at::BFloat16>, true});
#endif
}

void multiply_packed_bf16(const at::BFloat16* x, int64_t rows, int64_t n, int64_t k, const char* packed, float* y) {
#ifdef VITFAST_SIMD_LEVELS
  TileEpilogue epilogue;
  epilogue.y = y, epilogue.n = n;
  run_narrow(call_of(x, rows, k, packed, epilogue), {nullptr, &multiply, &finish<float>, true}, 1);
#endif
}

}  // namespace vitfast
