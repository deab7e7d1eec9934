// The product of linear.cpp, for other ops on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace vitfast {

// Writes the fp32 weight [N, K], which is contiguous, to `packed` as pack_linear_cpu returns it.
void pack_panels(const at::Tensor& weight, float* packed);

// y [rows, N] = x [rows, K] weight^T on the calling thread alone; `packed` is the weight [N, K] as pack_linear_cpu
// returns it, x and y are contiguous.
void multiply_packed(const float* x, int64_t rows, const at::Tensor& packed, float* y);

}  // namespace vitfast
