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

struct Int8Fours;

#ifdef VITFAST_SIMD_LEVELS
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
#endif

// Where x comes from: tiles [words, kTileStride], or rows [rows, stride] of words.
struct FromTile {
  const int32_t* x;
  VITFAST_INLINE int32_t at(int i) const { return x[i]; }
  VITFAST_INLINE void next() { x += kTileStride; }
};
template <typename number_t = int32_t, int rows = kTileRows>
struct FromRows {  // three rows for each pointer, which is as many as addresses are made of one and a stride
  const number_t* x[(rows + 2) / 3];
  int64_t stride;
  FromRows(const number_t* first, int64_t row_stride) : stride(row_stride) {
    for (int i = 0; i * 3 < rows; ++i) x[i] = first + i * 3 * stride;
  }
  VITFAST_INLINE number_t at(int i) const { return x[i / 3][i % 3 * stride]; }
  VITFAST_INLINE void next() {
#pragma GCC unroll 5
    for (int i = 0; i * 3 < rows; ++i) ++x[i];
  }
};

// Rows of x for a product, in whichever of these two forms.
struct NarrowRows {
  const int32_t* words;
  int64_t stride;  // of rows; 0 for a tile

  template <typename Function>
  VITFAST_INLINE void visit(const Function& f) const {
    if (stride == 0) return f(FromTile{words});
    f(FromRows<>(words, stride));
  }
};

// For a product that asks for nothing while it is computed; linear's have Ahead of tile_epilogue.h.
struct NothingAhead {
  static constexpr int64_t kRun = kTileStride;
  static constexpr int64_t steps() { return 0; }
  VITFAST_INLINE NothingAhead after(int64_t) const { return {}; }
  VITFAST_INLINE void ask() const {}
};

// `count` steps of a product; the first of them ask for what is ahead.
template <typename Asked, typename Step>
VITFAST_INLINE void run_asking(const Asked& ahead, int64_t count, const Step& step) {
  int64_t k = 0;
  for (const int64_t asking = std::min(count, ahead.steps()); k < asking;) {
    Asked asks = ahead.after(k);
    for (const int64_t stop = std::min(k + Asked::kRun, asking); k < stop; ++k) {
      asks.ask();
      step();
    }
  }
  for (; k < count; ++k) step();
}

// Hands `sink` the sums of rows i and vectors j: start[i] + x [words] of row i panel [words, kNarrowPanel].
template <typename P, int rows, int vectors, typename From, typename Asked, typename Sink>
VITFAST_INLINE void multiply_tile(From x, const int32_t* panel, int64_t words, const int32_t* start, const Asked& ahead,
                                  const Sink& sink) {
  typename P::Sum sum[rows][vectors];
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i) {
    sum[i][0] = typename P::Sum{};
    if constexpr (std::is_same_v<P, Int8Fours>) sum[i][0] += start[i];
    if constexpr (vectors == 2) sum[i][1] = sum[i][0];
  }
  constexpr int64_t kAhead = 8;
  const auto step = [&]() VITFAST_INLINE_LAMBDA {
    Words weight[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      weight[j] = load_words(panel + j * kWide);
      __builtin_prefetch(panel + kAhead * kNarrowPanel + j * kWide);
    }
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
      const Words word = x.at(i) - Words{};
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sum[i][j] = P::add(sum[i][j], word, weight[j]);
    }
    x.next(), panel += kNarrowPanel;
  };
  run_asking(ahead, words, step);
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) sink(i, j, sum[i][j]);
  }
}

// The same for `count` rows, 1 .. rows.
template <typename P, int rows = kTileRows, int vectors = 2, typename From, typename Asked, typename Sink>
VITFAST_INLINE void multiply_tile_rows(int64_t count, const From& x, const int32_t* panel, int64_t words,
                                       const int32_t* start, const Asked& ahead, const Sink& sink) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_tile_rows<P, rows - 1, vectors>(count, x, panel, words, start, ahead, sink);
  }
  multiply_tile<P, rows, vectors>(x, panel, words, start, ahead, sink);
}

// to [kNarrowChunk a row] = the sums; those of integers times a scale of the row, and added to what is there.
template <bool adds = false>
struct StoreSums {
  float* to;
  const float* scale = nullptr;
  int64_t scale_stride = 0;
  VITFAST_INLINE void operator()(int i, int j, const Floats& sums) const {
    store<kWide>(to + i * kNarrowChunk + j * kWide, sums);
  }
  VITFAST_INLINE void operator()(int i, int j, const Words& sums) const {
    float* at = to + i * kNarrowChunk + j * kWide;
    const Floats scaled = __builtin_convertvector(sums, Floats) * scale[i * scale_stride];
    store<kWide>(at, adds ? load<kWide>(at) + scaled : scaled);
  }
};

}  // namespace vitfast
