// The rate of the instructions that products are made of, from loops whose operands stay in registers: no product of
// this machine can be faster.

#include "product_roof.h"

#include <ATen/Parallel.h>

#include <chrono>
#include <numeric>
#include <vector>

#include "int8_avx2.h"
#include "narrow_tile.h"

namespace vitfast {

#ifdef VITFAST_SIMD_LEVELS
namespace {

constexpr int kSums = 24, kAvx2Sums = 12;  // of 32 registers, and of 16
constexpr int64_t kTimes = 200000;

// kTimes * sums additions; the sums are returned added up, so that they are needed.
template <typename P, int sums = kSums, typename Operand = Words>
VITFAST_INLINE typename P::Sum add_products() {
  typename P::Sum sum[sums] = {}, all{};
  const Operand x{}, weight{};
  for (int64_t i = 0; i < kTimes; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < sums; ++j) sum[j] = P::add(sum[j], x, weight);
  }
  for (int j = 0; j < sums; ++j) all += sum[j];
  return all;
}

struct Singles {
  using Sum = Floats;
  static VITFAST_INLINE Sum add(Sum sum, const Words& x, const Words& weight) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
    return sum;
  }
};

struct SinglesAvx2 {
  using Sum = Vector<kAvx2Lanes>;
  static VITFAST_INLINE Sum add(Sum sum, const Ints8& x, const Ints8& weight) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(weight));
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

VITFAST_TARGET("avx2,fma") void run_fp32_avx2() {
  sink = sum<kAvx2Lanes>(add_products<SinglesAvx2, kAvx2Sums, Ints8>());
}
VITFAST_TARGET("avx2,fma") void run_int8_avx2() {
  sink = static_cast<float>(add_products<Int16Pairs, kAvx2Sums, Ints8>()[0]);
}

// `products`: of each of kTimes. The threads' own rates together: one that is held up holds up no other.
double rate_of(void (*run)(), int64_t products) {
  const int64_t threads = at::get_num_threads();
  std::vector<double> rates(threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      run();
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      rates[i] = 2.0 * static_cast<double>(products * kTimes) / seconds.count();
    }
  });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace
#endif

std::vector<std::pair<std::string, double>> product_roofs() {
  std::vector<std::pair<std::string, double>> roofs;
#ifdef VITFAST_SIMD_LEVELS
  constexpr int64_t kLanes = kWide * kSums, kLanesAvx2 = kAvx2Lanes * kAvx2Sums;
  const Simd level = simd_level();
  if (level >= Simd::avx512) {
    roofs.emplace_back("float32", rate_of(&run_fp32, kLanes));
  } else if (level == Simd::avx2) {
    roofs.emplace_back("float32", rate_of(&run_fp32_avx2, kLanesAvx2));
  }
  if (level >= Simd::avx512_bf16) roofs.emplace_back("bfloat16", rate_of(&run_bf16, kLanes * Bfloat16Pairs::kPerWord));
  if (level >= Simd::avx512_vnni) {
    roofs.emplace_back("int8", rate_of(&run_int8, kLanes * Int8Fours::kPerWord));
  } else if (level >= Simd::avx2) {
    roofs.emplace_back("int8", rate_of(&run_int8_avx2, kLanesAvx2 * 2));  // pairs
  }
#endif
  return roofs;
}

}  // namespace vitfast
