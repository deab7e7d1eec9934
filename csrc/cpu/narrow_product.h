// The product of rows of x with a packed weight where both are narrower than fp32, in AVX-512: pairs of bf16
// (`vdpbf16ps`) or fours of int8 (`vpdpbusd`), a 32-bit word each, are multiplied and added to one sum a lane.
//
// The weight is packed into panels of kPanel rows, each [words, kPanel rows] of words, in the order in which they are
// read. Rows of x are copied into tiles [words, kTileStride rows], so that both operands of a product are read in one
// stream each, and a tile meets a panel with all its sums in registers, over all of K: sums of bf16 products are short
// of what rounds to bf16, and those of int8 products exact. Bound by the instruction: two loads of the weight and one
// of each row of x go with two instructions a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numbers.h"

namespace vitfast {

constexpr int64_t kNarrowPanel = 2 * kWide;  // rows of the weight, columns of y, per panel
constexpr int64_t kNarrowChunk = 128;        // columns of y per epilogue: whole panels, a tile of statistics, a group
constexpr int kTileRows = 14;                // as many as have their sums in registers
constexpr int64_t kTileStride = 16;          // a cache line of words

using Words = int32_t __attribute__((vector_size(4 * kWide)));

VITFAST_INLINE Words load_words(const void* from) {
  Words x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// Intrinsics would do, but GCC 12 copies and spills their sums.
struct Bfloat16Pairs {
  using Sum = Floats;
  static constexpr int64_t kPerWord = 2;
  static VITFAST_INLINE Sum add(Sum sum, const Words& x, const Words& weight) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
    return sum;
  }
};

struct Int8Fours {  // the weight without sign, 128 added; what that adds to the product is in what the sums start with
  using Sum = Words;
  static constexpr int64_t kPerWord = 4;
  static VITFAST_INLINE Sum add(Sum sum, const Words& x, const Words& weight) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    return sum;
  }
};

// Hands `sink` the sums of rows i and vectors j: start[i] + x [words, kTileStride] panel [words, kNarrowPanel].
template <typename P, int rows, typename Sink>
VITFAST_INLINE void multiply_tile(const int32_t* x, const int32_t* panel, int64_t words, const int32_t* start,
                                  const Sink& sink) {
  typename P::Sum sum[rows][2];
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i) {
    sum[i][0] = typename P::Sum{};
    if constexpr (std::is_same_v<P, Int8Fours>) sum[i][0] += start[i];
    sum[i][1] = sum[i][0];
  }
  constexpr int64_t kAhead = 8;
  for (int64_t k = 0; k < words; ++k, panel += kNarrowPanel, x += kTileStride) {
    const Words weight[2] = {load_words(panel), load_words(panel + kWide)};
    __builtin_prefetch(panel + kAhead * kNarrowPanel);
    __builtin_prefetch(panel + kAhead * kNarrowPanel + kWide);
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
      const Words word = x[i] - Words{};
      sum[i][0] = P::add(sum[i][0], word, weight[0]);
      sum[i][1] = P::add(sum[i][1], word, weight[1]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i) {
    sink(i, 0, sum[i][0]);
    sink(i, 1, sum[i][1]);
  }
}

// The same for `count` rows, 1 .. rows.
template <typename P, int rows = kTileRows, typename Sink>
VITFAST_INLINE void multiply_tile_rows(int64_t count, const int32_t* x, const int32_t* panel, int64_t words,
                                       const int32_t* start, const Sink& sink) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_tile_rows<P, rows - 1>(count, x, panel, words, start, sink);
  }
  multiply_tile<P, rows>(x, panel, words, start, sink);
}

// x [count, bytes] -> words [ceil(bytes / 4), kTileStride], what is beyond the end of a row or of the tile zero.
VITFAST_INLINE void pack_tile(const void* x, int64_t bytes, int64_t count, int32_t* words) {
  const int64_t whole = bytes / 4, rest = bytes % 4;
  float* to = reinterpret_cast<float*>(words);  // moved only
  for (int64_t i = 0; i < kTileStride; i += 4) {
    const char* rows[4];
    for (int64_t r = 0; r < 4; ++r) rows[r] = static_cast<const char*>(x) + std::min(i + r, count - 1) * bytes;
    int64_t k = 0;
    for (; k + 4 <= whole; k += 4) {
      Vector<4> square[4];
      for (int r = 0; r < 4; ++r) std::memcpy(&square[r], rows[r] + 4 * k, sizeof(square[r]));
      store_transposed(to + k * kTileStride + i, kTileStride, square);
    }
    for (; k < whole; ++k) {
      for (int r = 0; r < 4; ++r) std::memcpy(words + k * kTileStride + i + r, rows[r] + 4 * k, 4);
    }
    if (rest) {
      for (int r = 0; r < 4; ++r) {
        int32_t word = 0;
        std::memcpy(&word, rows[r] + 4 * whole, rest);
        words[whole * kTileStride + i + r] = word;
      }
    }
  }
}

// Rows [count, bytes] of the weight -> panel [ceil(bytes / 4), count] of words, `flip` exclusive-ored to each.
inline void pack_narrow_panel(const char* rows, int64_t bytes, int64_t count, uint32_t flip, char* panel) {
  for (int64_t k = 0; k < bytes; k += 4) {
    for (int64_t i = 0; i < count; ++i, panel += 4) {
      uint32_t word = 0;
      std::memcpy(&word, rows + i * bytes + k, std::min<int64_t>(4, bytes - k));
      word ^= flip;
      std::memcpy(panel, &word, 4);
    }
  }
}

// The panel of a packed weight [N, words] whose first row is `first`; the last one, where it is narrower, in `wide`.
inline const int32_t* panel_at(const void* packed, int64_t first, int64_t n, int64_t words, const int32_t* wide) {
  return first + kNarrowPanel > n ? wide : static_cast<const int32_t*>(packed) + first * words;
}

// wide [words, kNarrowPanel] = the last panel, if it is narrower, and zeros.
inline void widen_last_panel(const void* packed, int64_t n, int64_t words, int32_t* wide) {
  const int64_t width = n % kNarrowPanel;
  if (width == 0) return;
  const char* panel = static_cast<const char*>(packed) + (n - width) * words * 4;
  std::fill(wide, wide + words * kNarrowPanel, 0);
  for (int64_t k = 0; k < words; ++k) std::memcpy(wide + k * kNarrowPanel, panel + k * width * 4, width * 4);
}

// Rows or columns [begin, end).
struct Share {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Share i of n, as equal as whole steps allow.
inline Share share_of(int64_t size, int64_t step, int64_t i, int64_t n) {
  const int64_t units = (size + step - 1) / step;
  return {std::min(units * i / n * step, size), std::min(units * (i + 1) / n * step, size)};
}

// Tile t of a share of rows: as high as the others, rather than with a few rows in the last.
inline Share tile_of(Share rows, int64_t t, int64_t tiles) {
  return {rows.begin + rows.size() * t / tiles, rows.begin + rows.size() * (t + 1) / tiles};
}

// How y [M, N] is shared out among threads: shares of rows times shares of columns, the largest as small as can be. Of
// two such, the one that reads the smaller operand more often.
struct Grid {
  int64_t rows = 1, columns = 1;

  Grid(int64_t m, int64_t n, int64_t threads) {
    const int64_t chunks = (n + kNarrowChunk - 1) / kNarrowChunk;
    const auto largest = [&](int64_t r, int64_t c) { return (m + r - 1) / r * ((chunks + c - 1) / c); };
    for (int64_t i = 1; i <= threads; ++i) {
      const int64_t r = m < n ? i : threads / i, c = threads / r;
      if (largest(r, c) < largest(rows, columns)) rows = r, columns = c;
    }
  }
};

}  // namespace vitfast
