// What the linear kernel does with its sums before they are y. Lane l of warp w of a warpgroup has rows 16 w + l / 4
// and the one eight below: sums[4 j .. 4 j + 3] are columns 8 j + 2 (l % 4) and the next of the first row, then of the
// second.
//
// LayerNorm is folded: rstd (x W^T - mean weight_sum), with mean and rstd from pairs (mean, M2) of 128 columns of x, as
// kernels/linear.py has it; `y_stats` are the same pairs of y as stored. Scales are those of kernels/quantize.py.
//
// Source: Chan, Golub, LeVeque 1979 (combining statistics).
#pragma once

#include "../device/hopper.cuh"
#include "linear.h"

namespace vitfast {

// A quad of lanes holds a row of sums.
VITFAST_DEVICE float sum_of_quad(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
VITFAST_DEVICE float max_of_quad(float x) {
  x = max_or_nan(x, shuffle_xor(x, 1));
  return max_or_nan(x, shuffle_xor(x, 2));
}

// Mean and 1 / sqrt(variance + eps) of a row of x from its pairs, by Chan's formula; each lane of a quad takes its
// share.
VITFAST_DEVICE void combine_stats(const LinearCall& p, int row, int share, float& mean, float& rstd) {
  const int tiles = (p.k + kLinearStats - 1) / kLinearStats;
  const float* pairs = p.row_stats + 2 * static_cast<int64_t>(row) * tiles;
  const auto count = [&](int tile) {
    const int left = p.k - tile * kLinearStats;
    return static_cast<float>(left < kLinearStats ? left : kLinearStats);
  };
  const float share_of_k = reciprocal_fast(static_cast<float>(p.k));
  float pair[2], total = 0.0f, squares = 0.0f;
#pragma unroll 1
  for (int tile = share; tile < tiles; tile += 4) {
    load_floats(pair, pairs + 2 * tile);
    total += pair[0] * count(tile);
  }
  mean = sum_of_quad(total) * share_of_k;
#pragma unroll 1
  for (int tile = share; tile < tiles; tile += 4) {
    load_floats(pair, pairs + 2 * tile);
    squares += pair[1] + count(tile) * (pair[0] - mean) * (pair[0] - mean);
  }
  rstd = rsqrt_fast(sum_of_quad(squares) * share_of_k + p.eps);
}

// What a column has to do with its sums: `column` is that of sums[0]. Columns beyond the last, which nobody will see,
// take what the last have: loads without conditions can go out together.
VITFAST_DEVICE int within(int column, int n) { return column < n ? column : n - 2; }

// load(j, where) for the columns column + 8 j and the next, j < count. `whole`: no tile has columns beyond the last,
// and places are at fixed distances.
template <int count, typename F>
VITFAST_DEVICE void each_pair(int column, int n, bool whole, F load) {
  if (whole) {
#pragma unroll
    for (int j = 0; j < count; ++j) load(j, column + 8 * j);
  } else {
#pragma unroll
    for (int j = 0; j < count; ++j) load(j, within(column + 8 * j, n));
  }
}

// Pairs of 128 columns at a time are in registers beside the sums.
constexpr int kPairs = 16;

// The norm, and the bias if there is one.
template <typename T, int count>
VITFAST_DEVICE void fold_norm(float (&sums)[count], const LinearCall& p, int column, bool whole, float mean0,
                              float rstd0, float mean1, float rstd1) {
  const float shift0 = -mean0 * rstd0, shift1 = -mean1 * rstd1;
#pragma unroll
  for (int part = 0; part < count / (4 * kPairs); ++part) {
    float sum[kPairs][2];
    uint32_t bias[kPairs] = {};
    each_pair<kPairs>(column + 8 * kPairs * part, p.n, whole,
                      [&](int j, int where) { load_floats(sum[j], p.weight_sum + where); });
    if (p.bias) {
      each_pair<kPairs>(column + 8 * kPairs * part, p.n, whole,
                        [&](int j, int where) { bias[j] = load_pair(static_cast<const T*>(p.bias) + where); });
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      float *s = sums + 4 * (kPairs * part + j), low, high;
      unpack(T{}, bias[j], low, high);
      s[0] = rstd0 * s[0] + (shift0 * sum[j][0] + low), s[1] = rstd0 * s[1] + (shift0 * sum[j][1] + high);
      s[2] = rstd1 * s[2] + (shift1 * sum[j][0] + low), s[3] = rstd1 * s[3] + (shift1 * sum[j][1] + high);
    }
  }
}

template <int count>
VITFAST_DEVICE void rescale(float (&sums)[count], const float* scales, int column, int n, bool whole) {
#pragma unroll
  for (int part = 0; part < count / (4 * kPairs); ++part) {
    float scale[kPairs][2];
    each_pair<kPairs>(column + 8 * kPairs * part, n, whole,
                      [&](int j, int where) { load_floats(scale[j], scales + where); });
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      float* s = sums + 4 * (kPairs * part + j);
      s[0] *= scale[j][0], s[1] *= scale[j][1], s[2] *= scale[j][0], s[3] *= scale[j][1];
    }
  }
}

template <typename T, int count, typename F>
VITFAST_DEVICE void combine(float (&sums)[count], const void* vector, int column, int n, bool whole, F f) {
#pragma unroll
  for (int part = 0; part < count / (4 * kPairs); ++part) {
    uint32_t pair[kPairs];
    each_pair<kPairs>(column + 8 * kPairs * part, n, whole,
                      [&](int j, int where) { pair[j] = load_pair(static_cast<const T*>(vector) + where); });
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      float *s = sums + 4 * (kPairs * part + j), low, high;
      unpack(T{}, pair[j], low, high);
      s[0] = f(s[0], low), s[1] = f(s[1], high), s[2] = f(s[2], low), s[3] = f(s[3], high);
    }
  }
}

VITFAST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(-1.44269504f * x)); }

// GELU by erf, to 1e-3 or 2^-12 |x|, whichever is more: `fast_gelu` of kernels/_parts/activation.py, where its numbers
// are explained. In this order it takes no register more than there are.
VITFAST_DEVICE float gelu(float x) {
  const float square = fminf(x * x, 30.0f);
  const float tanh = tanh_fast(x * (0.797570344f + square * (0.0369573079f - square * 0.000344753544f)));
  x = fmaxf(x, -3.9f);
  return 0.5f * (x + x * tanh);
}

// `exact`: GELU by the error function.
template <bool exact, int count>
VITFAST_DEVICE void activate(float (&sums)[count], LinearActivation activation) {
  const auto each = [&sums](auto f) {
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] = f(sums[i]);
  };
  if (activation == LinearActivation::gelu) {
    each([](float x) { return exact ? 0.5f * x * (1.0f + erff(0.707106781f * x)) : gelu(x); });
  } else if (activation == LinearActivation::gelu_tanh) {
    each([](float x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); });
  } else if (activation == LinearActivation::quick_gelu) {
    each([](float x) { return x * sigmoid(1.702f * x); });
  } else if (activation == LinearActivation::silu) {
    each([](float x) { return x * sigmoid(x); });
  }
}

// (mean, M2) of this lane's two rows, 128 columns at a time; columns beyond y do not count.
template <int kColumns>
VITFAST_DEVICE void store_stats(const LinearCall& p, const float (&y)[kColumns / 2], int row0, int first_column,
                                int lane) {
  const int tiles = (p.n + kLinearStats - 1) / kLinearStats;
#pragma unroll
  for (int part = 0; part < kColumns / kLinearStats; ++part) {
    const int first = first_column + part * kLinearStats, left = p.n - first;
    const int groups = left < kLinearStats ? left / 8 : kLinearStats / 8;  // of eight columns
    float mean0 = 0.0f, mean1 = 0.0f, m2_0 = 0.0f, m2_1 = 0.0f;
#pragma unroll
    for (int j = 0; j < kLinearStats / 8; ++j) {
      const float* s = y + 4 * (part * kLinearStats / 8 + j);
      if (j < groups) mean0 += s[0] + s[1], mean1 += s[2] + s[3];
    }
    const float share = reciprocal_fast(static_cast<float>(8 * groups));
    mean0 = sum_of_quad(mean0) * share;
    mean1 = sum_of_quad(mean1) * share;
#pragma unroll
    for (int j = 0; j < kLinearStats / 8; ++j) {
      const float* s = y + 4 * (part * kLinearStats / 8 + j);
      if (j >= groups) continue;
      for (int i = 0; i < 2; ++i) {
        m2_0 += (s[i] - mean0) * (s[i] - mean0);
        m2_1 += (s[2 + i] - mean1) * (s[2 + i] - mean1);
      }
    }
    m2_0 = sum_of_quad(m2_0);
    m2_1 = sum_of_quad(m2_1);
    float* pairs = p.y_stats + 2 * (static_cast<int64_t>(row0) * tiles + first / kLinearStats);
    if (left > 0 && lane % 4 == 0 && row0 < p.m) store_floats(pairs, mean0, m2_0);
    if (left > 0 && lane % 4 == 0 && row0 + 8 < p.m)
      store_floats(pairs + 16 * static_cast<int64_t>(tiles), mean1, m2_1);
  }
}

// y in e4m3: scales the sums of this lane's two rows to at most 448, 128 columns at a time, and stores the scales.
template <int kColumns>
VITFAST_DEVICE void to_e4m3(const LinearCall& p, float (&y)[kColumns / 2], int row0, int first_column, int lane) {
  const int tiles = (p.n + kLinearScales - 1) / kLinearScales;
#pragma unroll
  for (int part = 0; part < kColumns / kLinearScales; ++part) {
    float* s = y + 4 * (part * kLinearScales / 8);
    const int first = first_column + part * kLinearScales, left = p.n - first;
    float most0 = 0x1p-100f, most1 = 0x1p-100f;  // no division by zero
#pragma unroll
    for (int j = 0; j < kLinearScales / 8; ++j) {
      if (8 * j >= left) continue;  // beyond y
      const float* t = s + 4 * j;
      most0 = max_or_nan(most0, max_or_nan(fabsf(t[0]), fabsf(t[1])));
      most1 = max_or_nan(most1, max_or_nan(fabsf(t[2]), fabsf(t[3])));
    }
    most0 = max_of_quad(most0), most1 = max_of_quad(most1);
    most0 += 0.0f * most0, most1 += 0.0f * most1;  // a row with an infinity is one of NaN
    const float by0 = 448.0f / most0, by1 = 448.0f / most1;
#pragma unroll
    for (int j = 0; j < kLinearScales / 8; ++j) {
      float* t = s + 4 * j;
      t[0] *= by0, t[1] *= by0, t[2] *= by1, t[3] *= by1;
    }
    float* scale = p.y_scale + static_cast<int64_t>(row0) * tiles + first / kLinearScales;
    if (left > 0 && lane % 4 == 0 && row0 < p.m) store_float(scale, most0 / 448.0f);
    if (left > 0 && lane % 4 == 0 && row0 + 8 < p.m)
      store_float(scale + 8 * static_cast<int64_t>(tiles), most1 / 448.0f);
  }
}

// To shared memory, boxes of 128 columns, 16 columns at a time. Neighbouring lanes have two bytes each of four columns
// of both rows: one takes the first row's four, the other the second's.
template <int kColumns>
VITFAST_DEVICE void store_e4m3(const float (&y)[kColumns / 2], uint32_t boxes, int box, int row_in_box, int lane) {
  const bool odd = lane % 2;
  const int row = row_in_box + 8 * odd;
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
    const float* s = y + 8 * j;
    const uint32_t first = pack(e4m3{}, s[0], s[1]) | pack(e4m3{}, s[4], s[5]) << 16;   // row 0, columns 0 and 8 ..
    const uint32_t second = pack(e4m3{}, s[2], s[3]) | pack(e4m3{}, s[6], s[7]) << 16;  // row 1
    const uint32_t mine = odd ? second : first, other = shuffle_xor(odd ? first : second, 1);
    const uint32_t left = odd ? other : mine, right = odd ? mine : other;
    const uint32_t near = (left & 0xffff) | right << 16, far = left >> 16 | (right & 0xffff0000);
    // Odd lanes begin with the far ones: the two rows are in the same banks.
    const uint32_t place = swizzle(boxes + j / 8 * box + row * 128 + j % 8 * 16) + lane % 4 / 2 * 4;
    store_shared_pair(place + 8 * odd, odd ? far : near);
    store_shared_pair(place + 8 * !odd, odd ? near : far);
  }
}

}  // namespace vitfast
