// Vectors of `lanes` floats as the compiler's own type: + * < ?: work element by element, at whatever width
// the function they are inlined into is compiled for. See VITFAST_TARGETS in simd.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace vitfast {

template <int lanes>
struct VectorOf {
  typedef float floats __attribute__((vector_size(lanes * sizeof(float))));
  typedef uint32_t ints __attribute__((vector_size(lanes * sizeof(float))));
};

template <int lanes>
using Vector = typename VectorOf<lanes>::floats;

template <int lanes>
VITFAST_INLINE Vector<lanes> load(const float* from) {
  Vector<lanes> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <int lanes>
VITFAST_INLINE void store(float* to, const Vector<lanes>& x) {
  std::memcpy(to, &x, sizeof(x));
}

template <int lanes>
VITFAST_INLINE Vector<lanes> broadcast(float x) {
  return x - Vector<lanes>{};
}

// The lanes of x added up; `largest` gives the greatest of them. By halves, so that the compiler stays in registers.
template <int lanes>
VITFAST_INLINE float sum(const Vector<lanes>& x) {
  if constexpr (lanes == 1) {
    return x[0];
  } else {
    Vector<lanes / 2> half[2];
    std::memcpy(half, &x, sizeof(x));
    return sum<lanes / 2>(half[0] + half[1]);
  }
}

template <int lanes>
VITFAST_INLINE float largest(const Vector<lanes>& x) {
  if constexpr (lanes == 1) {
    return x[0];
  } else {
    Vector<lanes / 2> half[2];
    std::memcpy(half, &x, sizeof(x));
    return largest<lanes / 2>(half[0] > half[1] ? half[0] : half[1]);
  }
}

// exp(x) for x <= 0, to 1.2 ulp; 0 below the smallest normal number, NaN for NaN.
template <int lanes>
VITFAST_INLINE Vector<lanes> exp_of_negative(const Vector<lanes>& x) {
  using Ints = typename VectorOf<lanes>::ints;
  constexpr float kLog2E = 1.44269504f;
  // log(2) in two parts: n * kHigh is exact, as kHigh ends in 9 zero bits and |n| <= 126.
  constexpr float kHigh = 0.693145752f, kLow = 1.42860677e-6f;
  // x = n log(2) + r. Adding 1.5 * 2^23 leaves n, rounded, in the low bits of the sum.
  constexpr float kRound = 12582912.0f;
  const Vector<lanes> shifted = x * kLog2E + kRound, n = shifted - kRound;
  const Vector<lanes> r = (x - n * kHigh) - n * kLow;
  // (exp(r) - 1 - r) / r^2 at the Chebyshev points of |r| <= log(2) / 2; off by 1e-8 of exp(r).
  Vector<lanes> p = r * 1.392625039e-3f + 8.363232948e-3f;
  p = p * r + 4.166655242e-2f;
  p = p * r + 1.666657626e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + (127 << 23);  // 2^n; the rest of kRound is shifted out
  Vector<lanes> power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.3f ? Vector<lanes>{} : p * power;
}

}  // namespace vitfast
