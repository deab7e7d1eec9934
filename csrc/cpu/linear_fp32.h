// The product of linear in fp32, for other ops on the CPU as well; linear.cpp checks its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "tile_epilogue.h"

namespace vitfast {

// Writes the fp32 weight [N, K], which is contiguous, to `packed` as pack_linear_cpu returns it.
void pack_panels(const at::Tensor& weight, float* packed);

// epilogue(x [M, K] weight^T); `packed` is the weight as pack_linear_cpu returns it, x is contiguous.
void linear_fp32(const at::Tensor& x, int64_t m, const at::Tensor& packed, const TileEpilogue& epilogue);

// y [rows, N] = x [rows, K] weight^T on the calling thread alone, likewise.
void multiply_packed(const float* x, int64_t rows, const at::Tensor& packed, float* y);

}  // namespace vitfast
