// Scores of attention on the CPU: what is done to a row of them between the two products, and to a row of the result.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../guards.h"
#include "numbers.h"
#include "vector.h"

namespace vitfast {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A tensor seen as four axes, broadcast where a stride is 0; strides in elements.
struct View {
  const void* data = nullptr;
  at::ScalarType dtype = at::kFloat;
  int64_t stride[4] = {};

  template <typename scalar_t>
  const scalar_t* at(int64_t i, int64_t j, int64_t k) const {
    return static_cast<const scalar_t*>(data) + i * stride[0] + j * stride[1] + k * stride[2];
  }
};

struct AttentionCall {
  int64_t batch, heads, queries, keys, head_dim;
  View q, k, v;               // [B, N, H, D]
  View bias = {}, mask = {};  // [B, H, Nq, Nk]; data is null where there is none
  float scale = 1.0f;
  bool causal = false;
  void* out = nullptr;       // [B, Nq, H, D], contiguous; or, in its place,
  int8_t* values = nullptr;  // [B, Nq, H, D] and
  float* scales = nullptr;   // [B, Nq, H]

  // Blocks of `size` queries of a head.
  int64_t blocks(int64_t size) const { return (Size("attention", queries) + (size - 1)).value() / size; }
};

// Asks for two rows of q, k and v of a head, by and by for all: they are far away when its turn comes.
struct NextHead {
  int64_t head = 0, row = 0;

  template <typename scalar_t>
  VITFAST_INLINE void ask(const AttentionCall& c) {
    if (head >= c.batch * c.heads || row >= std::max(c.keys, c.queries)) return;
    const int64_t b = head / c.heads, h = head % c.heads;
    for (const int64_t stop = row + 2; row < stop; ++row) {
      if (row < c.keys) ask_row(c.k.at<scalar_t>(b, row, h), c.head_dim);
      if (row < c.keys) ask_row(c.v.at<scalar_t>(b, row, h), c.head_dim);
      if (row < c.queries) ask_row(c.q.at<scalar_t>(b, row, h), c.head_dim);
    }
  }

 private:
  template <typename scalar_t>
  static VITFAST_INLINE void ask_row(const scalar_t* numbers, int64_t n) {
    constexpr int64_t kLine = 64 / sizeof(scalar_t);
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(numbers + i, 0, 2);  // to the second cache
  }
};

// Asks for two rows of a head's result, from row i of `count` on.
template <typename scalar_t>
VITFAST_INLINE void ask_outputs(const AttentionCall& c, int64_t b, int64_t first, int64_t count, int64_t h, int64_t i) {
  const auto ask = [&](const auto* out) VITFAST_INLINE_LAMBDA {
    constexpr int64_t kLine = 64 / sizeof(*out);
    for (const int64_t end = std::min(i + 2, count); i < end; ++i) {
      const auto* row = out + ((b * c.queries + first + i) * c.heads + h) * c.head_dim;
      for (int64_t d = 0; d < c.head_dim; d += kLine) __builtin_prefetch(row + d, 1);
    }
  };
  c.values ? ask(c.values) : ask(static_cast<const scalar_t*>(c.out));
}

// What a thread keeps from block to block: its memory, the head whose keys and values are packed there, and the one
// that comes next, probably.
struct AttentionState {
  float* memory;
  int64_t head = -1;
  NextHead next = {};

  // Whether the keys and values of a head are to be packed.
  VITFAST_INLINE bool turns_to(int64_t to) {
    if (to == head) return false;
    head = to, next = {to + 1};
    return true;
  }
};

// How a SIMD level goes about it.
struct AttentionVariant {
  int64_t block, memory;  // queries in a block; floats of memory that a thread needs
  // Blocks [begin, end) of all blocks of queries, numbered head by head.
  void (*run)(const AttentionCall&, int64_t, int64_t, AttentionState&);
};

// Both products in bf16, where there is AVX512-BF16.
AttentionVariant attention_bf16(const AttentionCall& call);

// The largest of scores [width], or 0 where no key is seen.
template <int lanes>
VITFAST_INLINE float shift_of(const float* scores, int64_t width) {
  Vector<lanes> most = load<lanes>(scores);
  for (int64_t n = lanes; n < width; n += lanes) {
    const Vector<lanes> x = load<lanes>(scores + n);
    most = x > most ? x : most;
  }
  const float shift = largest<lanes>(most);
  return shift == -kInfinity ? 0.0f : shift;
}

// scores [width] -> exp(scores - shift), in place; returns 1 / their sum, 0 where no key is seen.
template <int lanes>
VITFAST_INLINE float exponentiate(float* scores, int64_t width, float shift) {
  Vector<lanes> total{};
  for (int64_t n = 0; n < width; n += lanes) {
    const Vector<lanes> x = exp_of_negative<lanes>(load<lanes>(scores + n) - shift);
    store<lanes>(scores + n, x);
    total += x;
  }
  const float denominator = sum<lanes>(total);
  return denominator == 0.0f ? 0.0f : 1.0f / denominator;
}

template <typename bias_t>
VITFAST_INLINE void add_bias(const View& bias, int64_t b, int64_t h, int64_t i, int64_t keys, float* scores) {
  const bias_t* row = bias.at<bias_t>(b, h, i);
  for (int64_t n = 0; n < keys; ++n) scores[n] += static_cast<float>(row[n * bias.stride[3]]);
}

// Bias, mask and causality of query i; columns that are no keys, and keys that may not be seen, become -inf.
template <int lanes>
VITFAST_INLINE void adjust(const AttentionCall& c, int64_t b, int64_t h, int64_t i, int64_t keys, int64_t width,
                           float* scores) {
  if (c.bias.data) {
    if (c.bias.dtype == at::kFloat) add_bias<float>(c.bias, b, h, i, keys, scores);
    if (c.bias.dtype == at::kHalf) add_bias<at::Half>(c.bias, b, h, i, keys, scores);
    if (c.bias.dtype == at::kBFloat16) add_bias<at::BFloat16>(c.bias, b, h, i, keys, scores);
  }
  if (c.mask.data) {
    const bool* row = c.mask.at<bool>(b, h, i);
    for (int64_t n = 0; n < keys; ++n) scores[n] = row[n * c.mask.stride[3]] ? scores[n] : -kInfinity;
  }
  const int64_t seen = c.causal ? std::min(keys, i + 1) : keys;
  for (int64_t n = seen; n < width; n += lanes) store<lanes>(scores + n, Vector<lanes>{} - kInfinity);
}

// One row of a head's result: sums [head_dim], which are changed, times `inverse`, to query i.
template <typename scalar_t, Simd level>
VITFAST_INLINE void write_head(const AttentionCall& c, int64_t b, int64_t i, int64_t h, float inverse, float* sums) {
  const int64_t row = ((b * c.queries) + i) * c.heads + h;
  if (c.values) {
    for (int64_t d = 0; d < c.head_dim; ++d) sums[d] *= inverse;
    c.scales[row] = quantize_row<level>(sums, c.head_dim, c.values + row * c.head_dim);
    return;
  }
  scalar_t* to = static_cast<scalar_t*>(c.out) + row * c.head_dim;
  int64_t d = 0;
#ifdef VITFAST_SIMD_LEVELS
  if constexpr (level >= Simd::avx512_bf16 && std::is_same_v<scalar_t, at::BFloat16>) {
    for (; d + kWide <= c.head_dim; d += kWide) store_by_instruction(to + d, load_floats(sums + d) * inverse);
  }
#endif
  for (; d < c.head_dim; d += kWide) {
    const int64_t count = c.head_dim - d;
    store_rounded(to + d, load_floats(sums + d, count) * inverse, count);
  }
}

}  // namespace vitfast
