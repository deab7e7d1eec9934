// Vectors of 16 numbers in the dtypes of tensors, to and from floats; and rows of floats in 8 bits.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vector.h"

namespace vitfast {

constexpr int kWide = 16;  // lanes; below avx512f they are several registers

using Floats = Vector<kWide>;
using Bits = typename VectorOf<kWide>::ints;
typedef uint16_t Halves __attribute__((vector_size(2 * kWide)));
typedef int8_t Bytes __attribute__((vector_size(kWide)));

VITFAST_INLINE Bits bits_of(const Floats& x) {
  Bits bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

VITFAST_INLINE Floats floats_of(const Bits& bits) {
  Floats x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// bf16 as floats. level: of the function this is inlined into.
template <Simd level = Simd::standard>
VITFAST_INLINE Floats floats_of(const Halves& halves) {
#ifdef VITFAST_SIMD_LEVELS
  if constexpr (level >= Simd::avx512) {
    Bits words;  // of the conversion, GCC 12 makes two halves
    asm("vpmovzxwd %1, %0" : "=v"(words) : "v"(halves));
    return floats_of(words << 16);
  }
#endif
  return floats_of(__builtin_convertvector(halves, Bits) << 16);
}

template <Simd level = Simd::standard>
VITFAST_INLINE Floats load_floats(const float* from) {
  return load<kWide>(from);
}
template <Simd level = Simd::standard>
VITFAST_INLINE Floats load_floats(const at::Half* from) {
  return load_as_float<kWide>(from);
}
template <Simd level = Simd::standard>
VITFAST_INLINE Floats load_floats(const at::BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return floats_of<level>(halves);
}

// x as the dtype of `to` has it, there and in what is returned.
VITFAST_INLINE Floats store_rounded(float* to, const Floats& x) {
  store<kWide>(to, x);
  return x;
}
VITFAST_INLINE Floats store_rounded(at::Half* to, const Floats& x) {
  Floats rounded;
  for (int i = 0; i < kWide; ++i) {
    to[i] = static_cast<at::Half>(x[i]);
    rounded[i] = static_cast<float>(to[i]);
  }
  return rounded;
}
VITFAST_INLINE Floats store_rounded(at::BFloat16* to, const Floats& x) {
  const Bits bits = bits_of(x), even = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Bits kept = x == x ? even : Bits{} + 0x7fc0u;
  const Halves halves = __builtin_convertvector(kept, Halves);
  std::memcpy(to, &halves, sizeof(halves));
  return floats_of(kept << 16);
}

#ifdef VITFAST_SIMD_LEVELS
// x as bf16 by the instruction, which takes denormals for zero; there and in what is returned.
VITFAST_INLINE Floats store_by_instruction(at::BFloat16* to, const Floats& x) {
  Halves halves;  // not as an intrinsic, whose type has no name in every GCC
  asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
  std::memcpy(to, &halves, sizeof(halves));
  return floats_of<Simd::avx512_bf16>(halves);
}
#endif

// The first `count` of 16 numbers, `beyond` in place of the others.
template <Simd level = Simd::standard, typename scalar_t>
VITFAST_INLINE Floats load_floats(const scalar_t* from, int64_t count, float beyond = 0.0f) {
  if (count >= kWide) return load_floats<level>(from);
  scalar_t some[kWide];
  std::fill(some, some + kWide, static_cast<scalar_t>(beyond));
  std::copy(from, from + count, some);
  return load_floats(some);
}
template <typename scalar_t>
VITFAST_INLINE Floats store_rounded(scalar_t* to, const Floats& x, int64_t count) {
  if (count >= kWide) return store_rounded(to, x);
  scalar_t some[kWide];
  const Floats rounded = store_rounded(some, x);
  std::copy(some, some + count, to);
  return rounded;
}

template <int lanes>
VITFAST_INLINE uint32_t largest(const typename VectorOf<lanes>::ints& x) {
  if constexpr (lanes == 1) {
    return x[0];
  } else {
    typename VectorOf<lanes / 2>::ints half[2];
    std::memcpy(half, &x, sizeof(x));
    return largest<lanes / 2>(half[0] > half[1] ? half[0] : half[1]);
  }
}

// The lowest byte of each. level: of the function this is inlined into.
template <Simd level>
VITFAST_INLINE Bytes low_bytes(const Bits& x) {
#ifdef VITFAST_SIMD_LEVELS
  if constexpr (level >= Simd::avx512) {
    Bytes bytes;
    asm("vpmovdb %1, %0" : "=v"(bytes) : "v"(x));
    return bytes;
  }
#endif
  // In two steps: of one that narrows by four, GCC 12 makes element by element.
  const Halves halves = __builtin_convertvector(x, Halves);
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  int8_t pairs __attribute__((vector_size(2 * kWide)));
  std::memcpy(&pairs, &halves, sizeof(pairs));
  return __builtin_shufflevector(pairs, pairs, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#else
  return __builtin_convertvector(halves, Bytes);
#endif
}

VITFAST_INLINE Bits larger_magnitudes(const Bits& magnitudes, const Floats& x) {
  const Bits these = bits_of(x) & 0x7fffffffu;
  return these > magnitudes ? these : magnitudes;
}

// The bits of the largest magnitude of a row [n]: they are ordered as magnitudes are, and NaN comes above infinity.
template <typename scalar_t>
VITFAST_INLINE uint32_t largest_magnitude(const scalar_t* row, int64_t n) {
  Bits most{};
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) most = larger_magnitudes(most, load_floats(row + i));
  if (i < n) most = larger_magnitudes(most, load_floats(row + i, n - i));
  return largest<kWide>(most);
}
VITFAST_INLINE uint32_t largest_magnitude(const at::BFloat16* row, int64_t n) {  // 16 bits each
  typedef uint16_t Wide __attribute__((vector_size(4 * kWide)));
  Wide most{};
  int64_t i = 0;
  for (; i + 2 * kWide <= n; i += 2 * kWide) {
    Wide these;
    std::memcpy(&these, row + i, sizeof(these));
    these &= 0x7fff;
    most = these > most ? these : most;
  }
  Bits halves[2];  // an even and an odd one in each word
  std::memcpy(halves, &most, sizeof(most));
  halves[1] = halves[0] & 0xffff0000u, halves[0] <<= 16;
  Bits both = halves[0] > halves[1] ? halves[0] : halves[1];
  for (; i < n; i += kWide) both = larger_magnitudes(both, load_floats(row + i, n - i));
  return largest<kWide>(both);
}

// QUANTIZED and LEAST_AMAX of vitfast/ops/reference.py.
constexpr float kLargestInt8 = 127.0f, kLeastAmax = 0x1p-100f;

// The scale of numbers whose largest magnitude has these bits, and its inverse; NaN and 0 where one is not finite.
struct Int8Scale {
  float scale, inverse;

  explicit Int8Scale(uint32_t largest_bits) : scale(std::numeric_limits<float>::quiet_NaN()), inverse(0.0f) {
    float amax;
    std::memcpy(&amax, &largest_bits, sizeof(amax));
    if (!(amax < std::numeric_limits<float>::infinity())) return;
    amax = std::max(amax, kLeastAmax);
    scale = amax / kLargestInt8, inverse = kLargestInt8 / amax;
  }

  // x times the inverse, to the nearest integer; zeros where the inverse is 0.
  template <Simd level>
  VITFAST_INLINE Bytes rounded(const Floats& x) const {
    constexpr float kRound = 0x1.8p23f;  // a sum with it ends in the bits of the integer
    return inverse == 0.0f ? Bytes{} : low_bytes<level>(bits_of(x * inverse + kRound));
  }
};

// A row [n] in int8.
template <Simd level, typename scalar_t>
VITFAST_INLINE void round_row(const scalar_t* row, int64_t n, const Int8Scale& scale, int8_t* values) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const Bytes bytes = scale.rounded<level>(load_floats<level>(row + i));
    std::memcpy(values + i, &bytes, sizeof(bytes));
  }
  if (i < n) {
    const Bytes bytes = scale.rounded<level>(load_floats(row + i, n - i));
    std::memcpy(values + i, &bytes, n - i);
  }
}

// reference.quantize of a row [n] in int8: its scale, or NaN, with zeros for values, where it is not finite.
template <Simd level, typename scalar_t>
VITFAST_INLINE float quantize_row(const scalar_t* row, int64_t n, int8_t* values) {
  const Int8Scale scale(largest_magnitude(row, n));
  round_row<level>(row, n, scale, values);
  return scale.scale;
}

}  // namespace vitfast
