// Matrices as the tensor memory accelerator sees them; free of CUDA headers.
#pragma once

#include <cstdint>

namespace vitfast {

// What the driver (or the emulation) makes of a Matrix or Heads; 128 bytes that only the hardware reads.
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

// Heads of images, [images, rows, heads, columns], of which a box has rows of one head of one image; else like a
// Matrix.
struct Heads {
  const void* data;
  int64_t images, rows, heads, columns;
  int64_t image_stride, row_stride, head_stride;
  int box_rows, box_columns;
};

}  // namespace vitfast
