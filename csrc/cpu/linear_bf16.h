// The product of linear in bf16; linear.cpp checks its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "tile_epilogue.h"

namespace vitfast {

// Writes the bf16 weight [N, K], which is contiguous, to `packed` [N, K rounded up to pairs].
void pack_linear_bf16(const at::Tensor& weight, const at::Tensor& packed);

// y = epilogue(x [M, K] weight^T); x is contiguous, `packed` is the weight as pack_linear_bf16 writes it.
void linear_bf16(const at::Tensor& x, int64_t m, const at::Tensor& packed, const TileEpilogue& epilogue);

// y [rows, N] = x [rows, K] weight^T in fp32, on the calling thread alone, likewise; x is aligned to pairs.
void multiply_packed_bf16(const at::BFloat16* x, int64_t rows, int64_t n, int64_t k, const char* packed, float* y);

}  // namespace vitfast
