// The rate of the instructions that products are made of, from loops whose operands stay in registers: no product of
// this machine can be faster.

#include "product_roof.h"

#include <ATen/Parallel.h>

#include <chrono>

#include "narrow_tile.h"

namespace vitfast {

#ifdef VITFAST_SIMD_LEVELS
namespace {

constexpr int kSums = 24;
constexpr int64_t kTimes = 200000;

// kTimes * kSums instructions; the sums are returned added up, so that they are needed.
template <typename P>
VITFAST_INLINE typename P::Sum add_products() {
  typename P::Sum sum[kSums] = {}, all{};
  const Words x{}, weight{};
  for (int64_t i = 0; i < kTimes; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) sum[j] = P::add(sum[j], x, weight);
  }
  for (int j = 0; j < kSums; ++j) all += sum[j];
  return all;
}

struct Singles {
  using Sum = Floats;
  static constexpr int64_t kPerWord = 1;
  static VITFAST_INLINE Sum add(Sum sum, const Words& x, const Words& weight) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
    return sum;
  }
};

volatile float sink;
VITFAST_TARGET("avx512f") void run_fp32() { sink = sum<kWide>(add_products<Singles>()); }
VITFAST_TARGET("avx512f,avx512bw,avx512vl,avx512bf16") void run_bf16() {
  sink = sum<kWide>(add_products<Bfloat16Pairs>());
}
VITFAST_TARGET("avx512f,avx512bw,avx512vl,avx512vnni") void run_int8() {
  sink = static_cast<float>(add_products<Int8Fours>()[0]);
}

double rate_of(void (*run)(), int64_t per_word) {
  const int64_t threads = at::get_num_threads();
  const auto begin = std::chrono::steady_clock::now();
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) run();
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return 2.0 * kWide * per_word * kSums * kTimes * static_cast<double>(threads) / seconds.count();
}

}  // namespace
#endif

std::vector<std::pair<std::string, double>> product_roofs() {
  std::vector<std::pair<std::string, double>> roofs;
#ifdef VITFAST_SIMD_LEVELS
  if (simd_level() >= Simd::avx512) roofs.emplace_back("float32", rate_of(&run_fp32, Singles::kPerWord));
  if (simd_level() >= Simd::avx512_bf16) roofs.emplace_back("bfloat16", rate_of(&run_bf16, Bfloat16Pairs::kPerWord));
  if (simd_level() >= Simd::avx512_vnni) roofs.emplace_back("int8", rate_of(&run_int8, Int8Fours::kPerWord));
#endif
  return roofs;
}

}  // namespace vitfast
