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

VITFAST_BF16 void finish(const TileEpilogue& e, int64_t m, int64_t count, int64_t first, float* sums) {
  finish_rows<at::BFloat16, Simd::avx512_bf16>(e, m, count, first, sums);
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
  const int64_t row_bytes = 2 * x.size(-1);
  run_narrow({kOp, m, epilogue.n, row_bytes, static_cast<const char*>(read(kOp, "x", x)),
              static_cast<const char*>(read(kOp, "weight", packed)), (row_bytes + 3) / 4, nullptr, epilogue},
             {nullptr, &multiply, &finish, true});
#endif
}

void multiply_packed_bf16(const at::BFloat16* x, int64_t rows, int64_t stride, int64_t n, int64_t k, const char* packed,
                          float* y) {
#ifdef VITFAST_SIMD_LEVELS
  multiply_narrow(reinterpret_cast<const int32_t*>(x), rows, stride / 2, n, (k + 1) / 2, packed, &multiply, y);
#endif
}

}  // namespace vitfast
