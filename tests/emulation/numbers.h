// Numbers of one and two bytes as floats, and back.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulation {

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_fp16(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof(x));
  return static_cast<float>(x);
}
inline uint16_t to_fp16(float x) {
  const _Float16 narrow = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  return bits;
}

// e4m3 as the OCP's 8-bit floating point specification has it: exponents from -6, where subnormals begin, to 8; the
// last mantissa of the last exponent is NaN, and there is no infinity. Rounded to nearest even; beyond 448 it is 448.
inline float from_e4m3(uint16_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
  return bits & 0x80 ? -size : size;
}
inline uint8_t to_e4m3(float x) {
  if (std::isnan(x)) return 0x7f;
  const float size = std::fmin(std::fabs(x), 448.0f);
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  // In steps of this exponent, a whole number up to 16; one of 8 steps or more carries into the exponent's bits.
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  return static_cast<uint8_t>((std::signbit(x) ? 0x80 : 0) | ((exponent + 6) * 8 + steps));
}

}  // namespace emulation
