// Vectors of `lanes` floats as the compiler's own type: + * < ?: work element by element, at whatever width
// the function they are inlined into is compiled for (see simd.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC notes that vectors are passed in other registers at each level; none is: all of this is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

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

// Also from a narrower type.
template <int lanes, typename scalar_t>
VITFAST_INLINE Vector<lanes> load_as_float(const scalar_t* from) {
  Vector<lanes> x;
  for (int i = 0; i < lanes; ++i) x[i] = static_cast<float>(from[i]);
  return x;
}

template <int lanes>
VITFAST_INLINE void store(float* to, const Vector<lanes>& x) {
  std::memcpy(to, &x, sizeof(x));
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

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define VITFAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12
#define VITFAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VectorOf<4>::ints{__VA_ARGS__})
#endif

// to [4, 4] = the transpose of rows [4, 4].
VITFAST_INLINE void store_transposed(float* to, int64_t stride, const Vector<4> (&rows)[4]) {
  const Vector<4> low01 = VITFAST_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5),
                  low23 = VITFAST_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
  const Vector<4> high01 = VITFAST_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7);
  const Vector<4> high23 = VITFAST_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
  store<4>(to, VITFAST_SHUFFLE(low01, low23, 0, 1, 4, 5));
  store<4>(to + stride, VITFAST_SHUFFLE(low01, low23, 2, 3, 6, 7));
  store<4>(to + 2 * stride, VITFAST_SHUFFLE(high01, high23, 0, 1, 4, 5));
  store<4>(to + 3 * stride, VITFAST_SHUFFLE(high01, high23, 2, 3, 6, 7));
}

// exp(x) for x <= 0, to 1.3 ulp (0.94 with fused multiply-adds); 0 below the smallest normal number, NaN for NaN.
template <int lanes>
VITFAST_INLINE Vector<lanes> exp_of_negative(const Vector<lanes>& x) {
  using Ints = typename VectorOf<lanes>::ints;
  constexpr float kLog2E = 1.44269504f;
  // log(2) in two parts: n * kHigh is exact, as kHigh ends in 9 zero bits and |n| <= 126.
  constexpr float kHigh = 0.693145752f, kLow = 1.42860677e-6f;
  // x = n log(2) + r. Adding 1.5 * 2^23 + 127 leaves n + 127, rounded, in the low bits of the sum.
  constexpr float kRound = 12583039.0f;
  const Vector<lanes> shifted = x * kLog2E + kRound, n = shifted - kRound;
  const Vector<lanes> r = (x - n * kHigh) - n * kLow;
  // (exp(r) - 1 - r) / r^2 at the Chebyshev points of |r| <= log(2) / 2; off by 1e-8 of exp(r).
  Vector<lanes> p = r * 1.392625039e-3f + 8.363232948e-3f;
  p = p * r + 4.166655242e-2f;
  p = p * r + 1.666657626e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = bits << 23;  // 2^n; the rest of kRound is shifted out
  Vector<lanes> power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.3f ? Vector<lanes>{} : p * power;
}

}  // namespace vitfast
