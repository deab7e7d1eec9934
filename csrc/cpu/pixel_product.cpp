// Pixels are 8-bit integers, and AVX-512 VNNI multiplies four pairs of bytes where fp32 multiplies one pair. With the
// weights of an output channel as integers of 24 bits times a scale, the product is three products of bytes, one for
// each digit of the weights: 4/3 of fp32's rate, and exact, so that all there is of rounding is that of the weight.
//
// That is carried: what rounding leaves of a weight is added to the next one of the same channel of pixels, as error
// diffusion does with grey levels (Floyd and Steinberg 1976). The error of a product is then at most half a unit times
// the differences of neighbouring pixels, and the weights keep their sum: a flat patch, whose product is a small sum of
// large terms, is as good as exact. What is left after the last weight meets the last pixel in fp32.
//
// `vpdpbusd` takes pixels without sign; the 128 that comes off them is in what the sums start with.

#include "pixel_product.h"

#include <ATen/Parallel.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "../guards.h"
#include "vector.h"

namespace vitfast {
namespace {

constexpr int64_t kLanes = 16;  // output channels per panel
constexpr int64_t kDigits = 3;  // of a weight, highest first; -128 .. 127
// The largest weight of an output channel in units. Three digits hold 127 * (65536 + 256 + 1) = 8355711.
constexpr double kLargest = 8355700.0;
// Sums stay within 128 * 128 * K.
constexpr int64_t kMaxInner = 65536;
// What rounding the weights may leave: the noise of one fp32 sum of the K products, about twice that of the several
// sums that libraries make of them. Its variance is K / 12 * 2^-48 of the weights' square sum: each of K steps leaves
// 2^-48 / 6 of what has been summed, which is half on average. The bound is met unless one weight has an eighth of the
// square sum.
constexpr double kNoise = 0x1p-48 / 12.0;

// A panel of `width` output channels is made of groups of 4 * width bytes: digits [K / 4, kDigits, width, 4], what the
// sums start with [kDigits, width], and the scale [width].
int64_t groups_of(int64_t k) { return k / 4 * kDigits + kDigits + 1; }

int64_t panels_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

// Rows [width, K] of the weight -> panel; `rest` [channels, N], from these rows on; the noise of each, by what kNoise
// allows, and NaN where fp32 has no scale for it.
VITFAST_SIMD void pack_panel(const Order& order, const float* rows, int64_t n, int64_t k, int64_t width, int8_t* panel,
                             float* rest, double* noise) {
  double largest[kLanes] = {}, squares[kLanes] = {}, error[kLanes] = {}, inverse[kLanes];
  float scale[kLanes];
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t i = 0; i < width; ++i) {
      const double weight = rows[i * k + j];
      largest[i] = std::max(largest[i], std::abs(weight));
      squares[i] += weight * weight;
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    scale[i] = std::isfinite(squares[i]) ? static_cast<float>(largest[i] / kLargest) : 0.0f;
    inverse[i] = scale[i] > 0.0f ? 1.0 / scale[i] : 0.0;
  }

  const int64_t parts = order.interleaved ? 1 : order.channels, part = k / parts;
  std::vector<double> carries(order.channels * kLanes);
  uint32_t words[kDigits][kLanes] = {};  // digits of four weights
  int32_t start[kDigits][kLanes] = {};
  int64_t channel = 0;
  for (int64_t j = 0; j < k; ++j) {
    if (j % part == 0) channel = j / part;
    double* carry = carries.data() + channel * kLanes;
    for (int64_t i = 0; i < width; ++i) {
      constexpr double kRound = 0x1.8p52;  // a sum with it has no room for fractions
      const double value = rows[i * k + j] * inverse[i] + carry[i], whole = (value + kRound) - kRound;
      const double left = value - whole;
      error[i] += (carry[i] - left) * (carry[i] - left);
      carry[i] = left;
      // Adding 128 to each digit makes a plain number of base 256; flipping the highest bit of a byte takes it off.
      const uint32_t digits = (static_cast<uint32_t>(static_cast<int32_t>(whole)) + 0x808080u) ^ 0x808080u;
      for (int64_t d = 0; d < kDigits; ++d) {
        const uint32_t digit = digits >> 8 * (kDigits - 1 - d) & 255u;
        words[d][i] = words[d][i] >> 8 | digit << 24;
        start[d][i] -= 128 * static_cast<int8_t>(digit);
      }
    }
    channel = order.after(channel);
    if (j % 4 < 3) continue;
    for (int64_t d = 0; d < kDigits; ++d, panel += 4 * width) std::memcpy(panel, words[d], 4 * width);
  }
  for (int64_t d = 0; d < kDigits; ++d, panel += 4 * width) std::memcpy(panel, start[d], 4 * width);
  std::memcpy(panel, scale, 4 * width);
  for (int64_t c = 0; c < order.channels; ++c) {
    for (int64_t i = 0; i < width; ++i) rest[c * n + i] = static_cast<float>(carries[c * kLanes + i] * scale[i]);
  }
  for (int64_t i = 0; i < width; ++i) {
    const double allowed = kNoise * static_cast<double>(k) * squares[i];
    const bool scaled = std::isfinite(squares[i]) && (scale[i] >= FLT_MIN || largest[i] == 0.0);
    noise[i] = !scaled ? NAN : error[i] == 0.0 ? 0.0 : std::sqrt(error[i] / allowed) * scale[i];
  }
}

#ifdef VITFAST_SIMD_LEVELS

constexpr int kRows = 8;  // as many as have their sums in registers

using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

VITFAST_INLINE Ints load_ints(const int8_t* from) {
  Ints x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// sum + pixels * digits, four products to a lane. As an intrinsic, GCC 12 copies and spills the sums.
VITFAST_INLINE Ints add_products(Ints sum, const Ints& pixels, const Ints& digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(pixels), "v"(digits));
  return sum;
}

// y [rows, width of N] = scale (x - 128) [rows, K] panel^T, where the panel is kLanes wide.
template <int rows>
VITFAST_INLINE void multiply(const uint8_t* x, int64_t k, const int8_t* panel, float* y, int64_t n, int64_t width) {
  constexpr int64_t kGroup = 4 * kLanes;
  const int8_t *start = panel + k / 4 * kDigits * kGroup, *scales = start + kDigits * kGroup;
  Ints sum[rows][kDigits];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 3
    for (int d = 0; d < kDigits; ++d) sum[i][d] = load_ints(start + d * kGroup);
  }
  for (int64_t j = 0; j < k; j += 4, panel += kDigits * kGroup) {
    const Ints digits[kDigits] = {load_ints(panel), load_ints(panel + kGroup), load_ints(panel + 2 * kGroup)};
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      int32_t four;
      std::memcpy(&four, x + i * k + j, sizeof(four));
      const Ints pixels = four - Ints{};
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d) sum[i][d] = add_products(sum[i][d], pixels, digits[d]);
    }
  }
  Vector<kLanes> scale;
  std::memcpy(&scale, scales, sizeof(scale));
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i, y += n) {
    // Carried as integers, so that large digits may cancel; the lowest 16 bits are not negative.
    const Ints middle = sum[i][1] + (sum[i][2] >> 8), high = sum[i][0] + (middle >> 8);
    const Ints low = (middle & 255) << 8 | (sum[i][2] & 255);
    const Vector<kLanes> value =
        __builtin_convertvector(high, Vector<kLanes>) * 65536.0f + __builtin_convertvector(low, Vector<kLanes>);
    if (width == kLanes) {
      store<kLanes>(y, value * scale);
    } else {
      float some[kLanes];
      store<kLanes>(some, value * scale);
      std::copy(some, some + width, y);
    }
  }
}

// The same for `count` rows, 1 .. rows.
template <int rows>
VITFAST_INLINE void multiply_rows(int64_t count, const uint8_t* x, int64_t k, const int8_t* panel, float* y, int64_t n,
                                  int64_t width) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rows<rows - 1>(count, x, k, panel, y, n, width);
  }
  multiply<rows>(x, k, panel, y, n, width);
}

VITFAST_TARGET("avx512f,avx512vnni")
void multiply_panel(const uint8_t* x, int64_t rows, int64_t k, const int8_t* panel, float* y, int64_t n,
                    int64_t width) {
  for (int64_t i = 0; i < rows; i += kRows) {
    multiply_rows<kRows>(rows - i, x + i * k, k, panel, y + i * n, n, width);
  }
}

#endif

}  // namespace

std::string why_no_pixel_product(int64_t k) {
  if (simd_level() < Simd::avx512_vnni) return "there is no AVX-512 VNNI here";
  return k < 4 || k % 4 || k > kMaxInner ? c10::str("K = ", k, " is not a multiple of 4 from 4 to ", kMaxInner) : "";
}

std::string pack_pixel_weight(const Order& order, const at::Tensor& weight, int8_t* packed) {
  const int64_t n = weight.size(0), k = weight.size(1), groups = groups_of(k);
  const std::string reason = why_no_pixel_product(k);
  if (!reason.empty()) return reason;
  const float* data = read<float>("pack_patch_embed", "weight", weight);
  float* rest = reinterpret_cast<float*>(packed + n * 4 * groups);
  std::vector<double> noise(n);
  at::parallel_for(0, panels_of(n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kLanes; i < std::min(end * kLanes, n); i += kLanes) {
      const int64_t width = std::min(kLanes, n - i);
      pack_panel(order, data + i * k, n, k, width, packed + i * 4 * groups, rest + i, noise.data() + i);
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(noise[i])) return c10::str("output channel ", i, " of the weight is not finite, or too small");
    if (noise[i] > 1.0) {
      return c10::str("output channel ", i, " of the weight, in integers of 24 bits, has ", noise[i],
                      " times the noise of an fp32 sum");
    }
  }
  return "";
}

void multiply_pixels(const uint8_t* x, int64_t rows, int64_t n, int64_t k, const int8_t* packed, float* y) {
#ifdef VITFAST_SIMD_LEVELS
  const int64_t groups = groups_of(k);
  for (int64_t i = 0; i < n; i += kLanes, packed += groups * 4 * kLanes) {
    const int64_t width = std::min(kLanes, n - i);
    if (width == kLanes) {
      multiply_panel(x, rows, k, packed, y + i, n, kLanes);
      continue;
    }
    std::vector<int8_t> wide(groups * 4 * kLanes);
    for (int64_t g = 0; g < groups; ++g) std::copy_n(packed + g * 4 * width, 4 * width, wide.data() + g * 4 * kLanes);
    multiply_panel(x, rows, k, wide.data(), y + i, n, width);
  }
#endif
}

const float* pixel_rest(int64_t n, int64_t k, const int8_t* packed) {
  return reinterpret_cast<const float*>(packed + n * 4 * groups_of(k));
}

}  // namespace vitfast
