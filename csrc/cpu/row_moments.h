// Mean and variance of a row, for LayerNorm on the CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "numbers.h"
#include "vector.h"

namespace vitfast {

constexpr int kMomentLanes = 16;  // two or four registers on the levels below avx512f
constexpr int kMomentSums = 4;    // sums in flight

// f(x[i] - shift) summed over a row, for f(d) = d and f(d) = d * d.
struct Sums {
  float first, second;
};
VITFAST_INLINE Sums sums_about(const float* x, int64_t n, float shift) {
  Vector<kMomentLanes> first[kMomentSums] = {}, second[kMomentSums] = {};
  int64_t i = 0;
  for (; i + kMomentSums * kMomentLanes <= n; i += kMomentSums * kMomentLanes) {
    for (int j = 0; j < kMomentSums; ++j) {
      const Vector<kMomentLanes> d = load<kMomentLanes>(x + i + j * kMomentLanes) - shift;
      first[j] += d;
      second[j] += d * d;
    }
  }
  Sums s{sum<kMomentLanes>((first[0] + first[1]) + (first[2] + first[3])),
         sum<kMomentLanes>((second[0] + second[1]) + (second[2] + second[3]))};
  for (; i < n; ++i) {
    const float d = x[i] - shift;
    s.first += d;
    s.second += d * d;
  }
  return s;
}

// x [n] in fp32: itself, or a copy in `buffer`. level: of the function this is inlined into.
template <Simd level>
VITFAST_INLINE const float* widened(const float* x, int64_t, float*) {
  return x;
}
template <Simd level, typename scalar_t>
VITFAST_INLINE const float* widened(const scalar_t* x, int64_t n, float* buffer) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store<kWide>(buffer + i, load_floats<level>(x + i));
  for (; i < n; ++i) buffer[i] = static_cast<float>(x[i]);
  return buffer;
}

struct Moments {
  float mean, rstd;
};

// Two passes over a row, which the first brings into cache: one for the mean, one for the variance about it. The second
// also gives what rounding left in the mean, and takes it out (Chan, Golub, LeVeque 1983).
VITFAST_INLINE Moments moments_of(const float* x, int64_t n, float eps) {
  const float rough_mean = sums_about(x, n, 0.0f).first / n;
  const Sums s = sums_about(x, n, rough_mean);
  const float left = s.first / n;
  return {rough_mean + left, 1.0f / std::sqrt((s.second - s.first * left) / n + eps)};
}

}  // namespace vitfast
