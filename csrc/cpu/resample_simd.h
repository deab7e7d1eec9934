// What resample on the CPU takes for one image, and its SIMD.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "simd.h"

namespace vitfast {

constexpr int kResampleBits = 22;  // of a weight that are its fraction
constexpr int32_t kResampleHalf = 1 << (kResampleBits - 1);

// Images [rows, columns, channels] one after another; strides in bytes.
struct ResamplePass {
  const uint8_t* in;
  uint8_t* out;
  int64_t in_stride, out_stride;                  // of rows
  int64_t rows, columns, channels, kept, length;  // the first so many channels along rows; length: of the output
  const int64_t* first;
  const int32_t* weights;
  int64_t taps;
};

#ifdef VITFAST_SIMD_LEVELS

// Weights as words for SIMD: [output, steps, kinds, groups], a word for each kind of digit of each four taps. Taps are
// moved back where what fills them up would be read behind the end.
struct ResampleWords {
  std::vector<int64_t> first;
  std::vector<int32_t> words;
  int64_t steps;
};

// Of a pass over rows, or along them, whose input's axis is so long; nothing where SIMD has nothing for it.
std::optional<ResampleWords> resample_words(const ResamplePass& pass, bool over_rows, int64_t axis_length);

// An image; false where SIMD has nothing for its size.
bool resample_simd(const ResamplePass& pass, bool over_rows, const ResampleWords& words);

#endif

}  // namespace vitfast
