// A matrix as the tensor memory accelerator sees it; free of CUDA headers.
#pragma once

#include <cstdint>

namespace vitfast {

// What the driver (or the emulation) makes of a Matrix; 128 bytes that only the hardware reads.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// A row-major matrix of two-byte elements, copied in boxes that lie in shared memory with the 128-byte swizzle: at most
// 256 rows of at most 64 columns. `data` and rows are aligned to 16 bytes; the stride is in elements.
struct Matrix {
  const void* data;
  int64_t rows, columns, stride;
  int box_rows, box_columns;
};

}  // namespace vitfast
