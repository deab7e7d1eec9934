// The activations of linear, on vectors of floats.
#pragma once

#include <c10/util/Exception.h>

#include <cstring>
#include <optional>
#include <string>

#include "vector.h"

namespace vitfast {

enum class Activation { kNone, kGelu, kGeluTanh, kQuickGelu, kSilu, kSwiglu };

inline Activation activation_named(const char* op, const std::optional<std::string>& name) {
  if (!name) return Activation::kNone;
  if (*name == "gelu") return Activation::kGelu;
  if (*name == "gelu_tanh") return Activation::kGeluTanh;
  if (*name == "quick_gelu") return Activation::kQuickGelu;
  if (*name == "silu") return Activation::kSilu;
  if (*name == "swiglu") return Activation::kSwiglu;
  TORCH_CHECK_VALUE(false, op, ": activation must be one of gelu, gelu_tanh, quick_gelu, silu, swiglu or None, got '",
                    *name, "'");
}

template <int lanes>
VITFAST_INLINE Vector<lanes> magnitude(Vector<lanes> x) {
  typename VectorOf<lanes>::ints bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits &= 0x7fffffffu;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

// 1 / (1 + exp(-x)), without overflow on either side.
template <int lanes>
VITFAST_INLINE Vector<lanes> sigmoid(const Vector<lanes>& x) {
  const Vector<lanes> small = exp_of_negative<lanes>(-magnitude<lanes>(x)), whole = 1.0f / (1.0f + small);
  return x < 0.0f ? small * whole : whole;
}

// x / 2 * (1 + erf(x / sqrt(2))). With a = |x| / sqrt(2), erfc(a) = exp(-a p(a)): p is the polynomial closest to
// -log(erfc(a)) / a on [0, 5.5] in the sense that erfc(a) is off by 2e-10 at most; beyond, it counts as 0.
// The negative side is a product of small numbers, no difference of large ones.
template <int lanes>
VITFAST_INLINE Vector<lanes> gelu(const Vector<lanes>& x) {
  const Vector<lanes> a = magnitude<lanes>(x) * 0.707106781f;
  Vector<lanes> p = a * -9.95896376e-08f + 2.59229368e-06f;
  p = p * a - 2.95077013e-05f;
  p = p * a + 1.93298614e-04f;
  p = p * a - 7.89469002e-04f;
  p = p * a + 1.85614574e-03f;
  p = p * a - 2.93635252e-04f;
  p = p * a - 1.91005371e-02f;
  p = p * a + 1.02767306e-01f;
  p = p * a + 6.36620265e-01f;
  p = p * a + 1.12837915e+00f;
  const Vector<lanes> tail = a > 5.5f ? Vector<lanes>{} : 0.5f * exp_of_negative<lanes>(-a * p);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

template <int lanes>
VITFAST_INLINE Vector<lanes> gelu_tanh(const Vector<lanes>& x) {
  return x * sigmoid<lanes>(1.59576912f * (x + 0.044715f * x * x * x));
}

template <int lanes>
VITFAST_INLINE Vector<lanes> quick_gelu(const Vector<lanes>& x) {
  return x * sigmoid<lanes>(1.702f * x);
}

template <int lanes>
VITFAST_INLINE Vector<lanes> silu(const Vector<lanes>& x) {
  return x * sigmoid<lanes>(x);
}

// swiglu: silu of the gate, times what it lets through.
template <int lanes>
VITFAST_INLINE Vector<lanes> gated(const Vector<lanes>& gate, const Vector<lanes>& up) {
  return silu<lanes>(gate) * up;
}

constexpr int64_t kGatedRows = 64;  // a weight for swiglu has a multiple of them: gate and up in whole panels each

// Columns of y for a weight of n rows.
inline int64_t out_columns(const char* op, Activation activation, int64_t n) {
  if (activation != Activation::kSwiglu) return n;
  TORCH_CHECK_VALUE(n % kGatedRows == 0, op, ": swiglu reads a packed weight whose rows are a multiple of ", kGatedRows,
                    ", got ", n);
  return n / 2;
}

}  // namespace vitfast
