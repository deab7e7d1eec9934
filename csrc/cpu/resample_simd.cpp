// resample on the CPU by SIMD; resample.cpp has the same in plain loops. Every level gives the same bits.
//
// A weight of 24 bits is cut into digits that the products of narrow integers take: three of 8 bits for `vpdpbusd`,
// which adds four products of a pixel and a digit to a lane, two of 16 bits for `vpmaddwd`, which adds two. Four taps
// of a channel are brought side by side by a shuffle; weights of zero fill up the last four, or sixteen. Bound by
// memory when an image shrinks much.

#include "resample_simd.h"

#ifdef VITFAST_SIMD_LEVELS

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace vitfast {
namespace {

constexpr int kRows = 4;  // that share one read of the weights

struct Bytes {  // digits of base 256, lowest first
  static constexpr int64_t kKinds = 3;
  static int32_t word(int64_t kind, const int32_t* four) {
    uint32_t word = 0;
    for (int t = 0; t < 4; ++t) {
      // Adding 128 to each digit makes a plain number of base 256; flipping the highest bit of a byte takes it off.
      const uint32_t digits = (static_cast<uint32_t>(four[t]) + 0x808080u) ^ 0x808080u;
      word |= (digits >> 8 * kind & 255u) << 8 * t;
    }
    return static_cast<int32_t>(word);
  }
};

struct Halves {  // low halves of taps 0 and 2, of 1 and 3, and the high ones
  static constexpr int64_t kKinds = 4;
  static int32_t word(int64_t kind, const int32_t* four) {
    uint32_t word = 0;
    for (int t = 0; t < 2; ++t) {
      const int32_t weight = four[2 * t + kind % 2], low = static_cast<int16_t>(weight & 0xffff);
      const uint32_t half = static_cast<uint32_t>(kind < 2 ? low : (weight - low) / 65536) & 0xffffu;
      word |= half << 16 * t;
    }
    return static_cast<int32_t>(word);
  }
};

// Whether so many taps, filled up to whole steps, fit into the axis.
bool fits(int64_t taps, int64_t length, int64_t groups) {
  return (taps + 4 * groups - 1) / (4 * groups) * (4 * groups) <= length;
}

template <typename Digits>
ResampleWords packed_weights(const ResamplePass& p, int64_t axis_length, int64_t groups) {
  ResampleWords packed;
  packed.steps = (p.taps + 4 * groups - 1) / (4 * groups);
  const int64_t padded = packed.steps * 4 * groups;
  packed.first.resize(p.length);
  packed.words.resize(p.length * packed.steps * Digits::kKinds * groups);
  std::vector<int32_t> weights(padded);
  int32_t* word = packed.words.data();
  for (int64_t i = 0; i < p.length; ++i) {
    packed.first[i] = std::min(p.first[i], axis_length - padded);
    std::fill(weights.begin(), weights.end(), 0);
    std::copy_n(p.weights + i * p.taps, p.taps, weights.data() + p.first[i] - packed.first[i]);
    for (int64_t step = 0; step < packed.steps; ++step) {
      for (int64_t kind = 0; kind < Digits::kKinds; ++kind) {
        for (int64_t group = 0; group < groups; ++group) {
          *word++ = Digits::word(kind, weights.data() + (step * groups + group) * 4);
        }
      }
    }
  }
  return packed;
}

#define VITFAST_AVX2 VITFAST_TARGET("avx2")
#define VITFAST_VNNI VITFAST_TARGET("avx512f,avx512bw,avx512vl,avx512vnni")

// Up to kRows rows at a time; the pointers of those that are not there repeat the last one's.
struct RowPointers {
  const uint8_t* in[kRows];
  uint8_t* out[kRows];
  RowPointers(const ResamplePass& p, int64_t begin) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = std::min(begin + r, p.rows - 1);
      in[r] = p.in + row * p.in_stride;
      out[r] = p.out + row * p.out_stride;
    }
  }
};

// sum + pixels * digits, four products to a lane. As an intrinsic, GCC 12 copies and spills the sums.
VITFAST_VNNI inline __m512i add_products(__m512i sum, __m512i pixels, __m512i digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(pixels), "v"(digits));
  return sum;
}

VITFAST_VNNI inline __m512i joined(const __m512i* sums) {
  const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(sums[2], 8), sums[1]);
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), sums[0]);
}

// The four channels of a pixel, in their lanes, to bytes.
VITFAST_AVX2 inline int32_t pixel_of(__m128i total) {
  total = _mm_srai_epi32(_mm_add_epi32(total, _mm_set1_epi32(kResampleHalf)), kResampleBits);
  total = _mm_packs_epi32(total, total);
  return _mm_cvtsi128_si32(_mm_packus_epi16(total, total));
}

// Sixteen taps a step: four pixels in each quarter of a vector, their channels side by side.
template <int channels, int kept>
VITFAST_VNNI void along_rows_vnni(const ResamplePass& p, const ResampleWords& packed, const RowPointers& rows) {
  const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i apart = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);  // of three channels
  const __m512i gather =
      _mm512_broadcast_i32x4(channels == 3 ? _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, 12, 13, 14, 15)
                                           : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const int32_t* words = packed.words.data();
  for (int64_t i = 0; i < p.length; ++i) {
    __m512i sums[kRows][3];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int d = 0; d < 3; ++d) sums[r][d] = _mm512_setzero_si512();
    }
    int64_t at = packed.first[i] * channels;
    for (int64_t step = 0; step < packed.steps; ++step, at += 16 * channels, words += 12) {
      __m512i digits[3];
#pragma GCC unroll 3
      for (int d = 0; d < 3; ++d) {
        const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 4 * d));
        digits[d] = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(four));
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        __m512i pixels;
        if constexpr (channels == 3) {
          pixels = _mm512_permutexvar_epi32(apart, _mm512_maskz_loadu_epi32(0x0fff, rows.in[r] + at));
        } else {
          pixels = _mm512_loadu_si512(rows.in[r] + at);
        }
        pixels = _mm512_shuffle_epi8(pixels, gather);
#pragma GCC unroll 3
        for (int d = 0; d < 3; ++d) sums[r][d] = add_products(sums[r][d], pixels, digits[d]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i total = joined(sums[r]);
      const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(total), _mm512_extracti64x4_epi64(total, 1));
      const int32_t pixel = pixel_of(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
      std::memcpy(rows.out[r] + i * kept, &pixel, kept);
    }
  }
}

// Bytes of four rows side by side, in four vectors.
struct Quads {
  __m512i of[4];
};
VITFAST_VNNI inline Quads quads_of(const uint8_t* from, int64_t stride) {
  __m512i row[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) row[k] = _mm512_loadu_si512(from + k * stride);
  const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
  return {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
          _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
}

VITFAST_VNNI void across_rows_vnni(const ResamplePass& p, const ResampleWords& packed) {
  constexpr int64_t kAtOnce = 64;
  const int64_t bytes = p.columns * p.channels;
  for (int64_t i = 0; i < p.length; ++i) {
    for (int64_t begin = 0; begin < bytes; begin += kAtOnce) {
      const int64_t at = std::min(begin, bytes - kAtOnce);  // the last ones once more, where they are no whole vector
      const uint8_t* from = p.in + packed.first[i] * p.in_stride + at;
      const int32_t* words = packed.words.data() + i * packed.steps * 3;
      __m512i sums[4][3];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 3
        for (int d = 0; d < 3; ++d) sums[q][d] = _mm512_setzero_si512();
      }
      for (int64_t step = 0; step < packed.steps; ++step, from += 4 * p.in_stride, words += 3) {
        const Quads quads = quads_of(from, p.in_stride);
#pragma GCC unroll 3
        for (int d = 0; d < 3; ++d) {
          const __m512i digits = _mm512_set1_epi32(words[d]);
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) sums[q][d] = add_products(sums[q][d], quads.of[q], digits);
        }
      }
      __m512i total[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        total[q] =
            _mm512_srai_epi32(_mm512_add_epi32(joined(sums[q]), _mm512_set1_epi32(kResampleHalf)), kResampleBits);
      }
      const __m512i low = _mm512_packs_epi32(total[0], total[1]), high = _mm512_packs_epi32(total[2], total[3]);
      _mm512_storeu_si512(p.out + i * p.out_stride + at, _mm512_packus_epi16(low, high));
    }
  }
}

// Both sums, of low and of high halves, of four taps to a lane.
struct Halved {
  __m256i low, high;
};
VITFAST_AVX2 inline void add_quads(Halved& sums, __m256i pixels, const __m256i (&words)[4]) {
  const __m256i even = _mm256_and_si256(pixels, _mm256_set1_epi32(0x00ff00ff)), odd = _mm256_srli_epi16(pixels, 8);
  sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(even, words[0]));
  sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(odd, words[1]));
  sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(even, words[2]));
  sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(odd, words[3]));
}
VITFAST_AVX2 inline __m256i joined(const Halved& sums) {
  return _mm256_add_epi32(_mm256_slli_epi32(sums.high, 16), sums.low);
}

// Eight taps a step: four pixels in each half of a vector. Of three channels they are bytes 0 .. 12 and 12 .. 24, and
// the second load begins at 8, so as to end where they end.
template <int channels, int kept>
VITFAST_AVX2 void along_rows_avx2(const ResamplePass& p, const ResampleWords& packed, const RowPointers& rows) {
  const __m256i gather =
      channels == 3 ? _mm256_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, 12, 13, 14, 15, 4, 7, 10, 13, 5, 8, 11, 14,
                                       6, 9, 12, 15, 0, 1, 2, 3)
                    : _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const int32_t* words = packed.words.data();
  for (int64_t i = 0; i < p.length; ++i) {
    Halved sums[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t at = packed.first[i] * channels;
    for (int64_t step = 0; step < packed.steps; ++step, at += 8 * channels, words += 8) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
      __m256i spread[4];
#pragma GCC unroll 4
      for (int kind = 0; kind < 4; ++kind) {
        const int a = 2 * kind, b = a + 1;
        spread[kind] = _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(a, a, a, a, b, b, b, b));
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto* from = reinterpret_cast<const __m128i*>(rows.in[r] + at);
        const auto* rest = reinterpret_cast<const __m128i*>(rows.in[r] + at + (channels == 3 ? 8 : 16));
        const __m256i pixels =
            _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(from)), _mm_loadu_si128(rest), 1);
        add_quads(sums[r], _mm256_shuffle_epi8(pixels, gather), spread);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256i total = joined(sums[r]);
      const int32_t pixel = pixel_of(_mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1)));
      std::memcpy(rows.out[r] + i * kept, &pixel, kept);
    }
  }
}

VITFAST_AVX2 void across_rows_avx2(const ResamplePass& p, const ResampleWords& packed) {
  constexpr int64_t kAtOnce = 32;
  const int64_t bytes = p.columns * p.channels;
  for (int64_t i = 0; i < p.length; ++i) {
    for (int64_t begin = 0; begin < bytes; begin += kAtOnce) {
      const int64_t at = std::min(begin, bytes - kAtOnce);
      const uint8_t* from = p.in + packed.first[i] * p.in_stride + at;
      const int32_t* words = packed.words.data() + i * packed.steps * 4;
      Halved sums[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sums[q] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      for (int64_t step = 0; step < packed.steps; ++step, from += 4 * p.in_stride, words += 4) {
        __m256i row[4], spread[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          row[k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k * p.in_stride));
          spread[k] = _mm256_set1_epi32(words[k]);
        }
        const __m256i low01 = _mm256_unpacklo_epi8(row[0], row[1]), high01 = _mm256_unpackhi_epi8(row[0], row[1]);
        const __m256i low23 = _mm256_unpacklo_epi8(row[2], row[3]), high23 = _mm256_unpackhi_epi8(row[2], row[3]);
        add_quads(sums[0], _mm256_unpacklo_epi16(low01, low23), spread);
        add_quads(sums[1], _mm256_unpackhi_epi16(low01, low23), spread);
        add_quads(sums[2], _mm256_unpacklo_epi16(high01, high23), spread);
        add_quads(sums[3], _mm256_unpackhi_epi16(high01, high23), spread);
      }
      __m256i total[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        total[q] =
            _mm256_srai_epi32(_mm256_add_epi32(joined(sums[q]), _mm256_set1_epi32(kResampleHalf)), kResampleBits);
      }
      const __m256i low = _mm256_packs_epi32(total[0], total[1]), high = _mm256_packs_epi32(total[2], total[3]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.out + i * p.out_stride + at), _mm256_packus_epi16(low, high));
    }
  }
}

bool wide() { return simd_level() >= Simd::avx512_vnni; }

}  // namespace

std::optional<ResampleWords> resample_words(const ResamplePass& p, bool over_rows, int64_t axis_length) {
  const int64_t groups = over_rows ? 1 : wide() ? 4 : 2;
  const bool suits = simd_level() >= Simd::avx2 && p.taps > 0 && fits(p.taps, axis_length, groups) &&
                     (over_rows || (p.kept >= 3 && p.channels <= 4));
  if (!suits) return std::nullopt;
  return wide() ? packed_weights<Bytes>(p, axis_length, groups) : packed_weights<Halves>(p, axis_length, groups);
}

bool resample_simd(const ResamplePass& p, bool over_rows, const ResampleWords& packed) {
  if (over_rows) {
    if (p.columns * p.channels < (wide() ? 64 : 32)) return false;
    wide() ? across_rows_vnni(p, packed) : across_rows_avx2(p, packed);
    return true;
  }
  auto* along = wide() ? &along_rows_vnni<4, 4> : &along_rows_avx2<4, 4>;
  if (p.kept == 3) along = wide() ? &along_rows_vnni<4, 3> : &along_rows_avx2<4, 3>;
  if (p.channels == 3) along = wide() ? &along_rows_vnni<3, 3> : &along_rows_avx2<3, 3>;
  for (int64_t begin = 0; begin < p.rows; begin += kRows) along(p, packed, RowPointers(p, begin));
  return true;
}

}  // namespace vitfast

#endif
