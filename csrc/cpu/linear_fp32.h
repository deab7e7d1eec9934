// The product of linear in fp32, for other ops on the CPU as well; linear.cpp checks its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "activation.h"

namespace vitfast {

constexpr int64_t kStatsTile = 128;  // columns of y per pair of row statistics

// What is done to the product; a null pointer leaves its part out.
struct LinearEpilogue {
  const float *mean = nullptr, *rstd = nullptr, *weight_sum = nullptr;  // [M], [M], [N]: LayerNorm of x, folded
  const float* bias = nullptr;                                          // [N]
  Activation activation = Activation::kNone;
  const float* layer_scale = nullptr;  // [N]
  const float* residual = nullptr;     // [M, N]
  int64_t up = 0;                      // swiglu: column of the product where the up projection begins, N; else 0
  float* stats = nullptr;              // [M, tiles, 2]
};

// Writes the fp32 weight [N, K], which is contiguous, to `packed` as pack_linear_cpu returns it.
void pack_panels(const at::Tensor& weight, float* packed);

// y = epilogue(x [M, K] weight^T) [M, N]; `packed` is the weight as pack_linear_cpu returns it, x and y are contiguous.
void linear_fp32(const float* x, int64_t m, const at::Tensor& packed, int64_t n, float* y,
                 const LinearEpilogue& epilogue);

// y [rows, N] = x [rows, K] weight^T on the calling thread alone, likewise.
void multiply_packed(const float* x, int64_t rows, const at::Tensor& packed, float* y);

}  // namespace vitfast
