// The product of narrow_tile.h in int8 where there is AVX2 and no AVX-512 VNNI: bytes are widened to 16 bits, and
// `vpmaddwd` multiplies those two by two, which is exact. (`vpmaddubsw`, which multiplies bytes, saturates at 16 bits.)
//
// A word of either operand is taken apart into its even bytes and its odd ones: those of x once for a panel, those of
// the weight, which is without sign, on their way into registers. Bound by the instructions: a `vpmaddwd` and an
// addition for two products a lane.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "narrow_tile.h"

#ifdef VITFAST_SIMD_LEVELS
namespace vitfast {

constexpr int kAvx2Lanes = 8;
constexpr int kAvx2Rows = 5, kAvx2Vectors = 2;  // as many as have their sums in 16 registers
constexpr int64_t kAvx2Words = 64;              // of K, whose bytes of x and of a panel stay in the first-level cache

using Ints8 = int32_t __attribute__((vector_size(4 * kAvx2Lanes)));
using Ints16 = int16_t __attribute__((vector_size(4 * kAvx2Lanes)));
using Bits16 = uint16_t __attribute__((vector_size(4 * kAvx2Lanes)));

// Two products a lane. In one piece: an addition of its own would be moved, until sums are spilled.
struct Int16Pairs {
  using Sum = Ints8;
  static VITFAST_INLINE Sum add(Sum sum, const Ints8& x, const Ints8& weight) {
    Ints8 products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(x), "x"(weight));
    return sum;
  }
};

// sums [rows, kNarrowPanel] += x [words, 2, kTileStride] panel [words, kNarrowPanel], for kAvx2Vectors of the columns.
template <int rows>
VITFAST_INLINE void add_products(const int32_t* x, const int32_t* panel, int64_t words, int32_t* sums) {
  Ints8 sum[rows][kAvx2Vectors];
#pragma GCC unroll 5
  for (int i = 0; i < rows; ++i) std::memcpy(sum[i], sums + i * kNarrowPanel, sizeof(sum[i]));
  for (int64_t k = 0; k < words; ++k, panel += kNarrowPanel) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd, x += kTileStride) {
      Ints8 weight[kAvx2Vectors];
#pragma GCC unroll 2
      for (int j = 0; j < kAvx2Vectors; ++j) {
        Bits16 bytes;
        std::memcpy(&bytes, panel + j * kAvx2Lanes, sizeof(bytes));
        weight[j] = reinterpret_cast<Ints8>(odd ? bytes >> 8 : bytes & 255);
      }
#pragma GCC unroll 5
      for (int i = 0; i < rows; ++i) {
        const Ints8 pair = x[i] - Ints8{};
#pragma GCC unroll 2
        for (int j = 0; j < kAvx2Vectors; ++j) sum[i][j] = Int16Pairs::add(sum[i][j], pair, weight[j]);
      }
    }
  }
#pragma GCC unroll 5
  for (int i = 0; i < rows; ++i) std::memcpy(sums + i * kNarrowPanel, sum[i], sizeof(sum[i]));
}

// The same for `count` rows, in groups of `rows` and less.
template <int rows = kAvx2Rows>
VITFAST_INLINE void add_products_of_rows(int64_t count, const int32_t* x, const int32_t* panel, int64_t words,
                                         int32_t* sums) {
  for (; count >= rows; count -= rows, x += rows, sums += rows * kNarrowPanel)
    add_products<rows>(x, panel, words, sums);
  if constexpr (rows > 1) {
    if (count > 0) add_products_of_rows<rows - 1>(count, x, panel, words, sums);
  }
}

// x [words, kTileStride] of bytes with a sign -> [words, 2, kTileStride] of pairs of 16 bits: even bytes, odd ones.
VITFAST_INLINE void widen_pairs(const int32_t* x, int64_t words, int32_t* pairs) {
  for (int64_t k = 0; k < words; ++k, x += kTileStride, pairs += 2 * kTileStride) {
    for (int64_t i = 0; i < kTileStride; i += kAvx2Lanes) {
      Bits16 bytes;
      std::memcpy(&bytes, x + i, sizeof(bytes));
      const Ints16 even = reinterpret_cast<Ints16>(bytes << 8) >> 8, odd = reinterpret_cast<Ints16>(bytes) >> 8;
      std::memcpy(pairs + i, &even, sizeof(even));
      std::memcpy(pairs + kTileStride + i, &odd, sizeof(odd));
    }
  }
}

// multiply_tile_rows<Int8Fours> in AVX2.
template <typename Sink>
VITFAST_INLINE void multiply_tile_rows_avx2(int64_t count, const int32_t* x, const int32_t* panel, int64_t words,
                                            const int32_t* start, const Sink& sink) {
  alignas(64) int32_t pairs[kAvx2Words * 2 * kTileStride], sums[kTileRows * kNarrowPanel];
  for (int64_t i = 0; i < count; ++i) std::fill_n(sums + i * kNarrowPanel, kNarrowPanel, start[i]);
  for (int64_t k = 0; k < words; k += kAvx2Words) {
    const int64_t some = std::min(kAvx2Words, words - k);
    widen_pairs(x + k * kTileStride, some, pairs);
    for (int64_t n = 0; n < kNarrowPanel; n += kAvx2Vectors * kAvx2Lanes) {
      add_products_of_rows(count, pairs, panel + k * kNarrowPanel + n, some, sums + n);
    }
  }
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < 2; ++j) sink(i, j, load_words(sums + i * kNarrowPanel + j * kWide));
  }
}

}  // namespace vitfast
#endif
