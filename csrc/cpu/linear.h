// The product of linear.cpp, for other ops on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace vitfast {

// y [rows, N] = x [rows, K] weight^T on the calling thread alone; `packed` is the weight [N, K] as pack_linear_cpu
// returns it, x and y are contiguous.
void multiply_packed(const float* x, int64_t rows, const at::Tensor& packed, float* y);

}  // namespace vitfast
