// What the CUDA patch_embed kernel and its launcher share; free of torch and of CUDA headers.
#pragma once

#include <cstdint>

namespace vitfast {

enum class PixelType { uint8, bf16 };

struct PatchEmbedParams {
  const void* images;    // by strides
  const void* weight;    // [C, weight_stride] bf16, aligned to 16 bytes, zeros beyond K
  const void* bias;      // [C] or null; like the following, contiguous bf16, aligned to 4 bytes
  const void* position;  // [L, C] or null
  const void* prefix;    // [P, C], null if P = 0
  void* out;             // [B, P + L, C]
  // In elements: from one image to the next, from a patch to that below and to its right, and along the three axes
  // that K runs over, outermost first: K = outer * middle * inner.
  int64_t image_stride, down, right, outer_stride, middle_stride, inner_stride;
  int middle, inner;
  int rows, tokens, prefix_tokens, grid_width, width, k, weight_stride;  // rows = B (P + L), tokens = P + L, width = C
  bool pairs;  // K's numbers 2 i and 2 i + 1 lie next to each other, aligned to both of them
};

// Starts the kernel on a stream (a cudaStream_t); a cudaError_t, 0 if all is well. There is at least one row; C is
// even, weight_stride a multiple of 8.
int patch_embed_launch(PixelType type, const PatchEmbedParams& params, void* stream);

}  // namespace vitfast
