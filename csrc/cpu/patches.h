// The patches of images as rows of a matrix, for patch_embed on the CPU.
//
// A row is its patch's difference from the patch's level, the mean of each channel. The product of a flat patch, such
// as plain background, would be a small sum of large terms, whose rounding a model may amplify a thousandfold; its
// differences are nearly zero. The level is multiplied by the weight's sums over a channel. Rows of bytes are left as
// they are: their level is the last pixel of each channel.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>

#include "pixel_product.h"

namespace vitfast {

// Where patches lie in the images; strides in elements. `size` and `stride` are the three nested runs of
// pixels of one patch, outermost first, in the order of the weight's K axis.
struct Patches {
  Order order;
  int64_t batch, prefix, grid_h, grid_w;
  int64_t image_stride, down, right;
  std::array<int64_t, 3> size, stride;

  // Arguments as check_patch_embed takes them, which has seen that none of the following is too large.
  Patches(const at::Tensor& images, at::IntArrayRef patch_size, bool channels_last,
          const std::optional<at::Tensor>& prefix);
  int64_t tokens() const { return prefix + grid_h * grid_w; }
  int64_t inner() const { return size[0] * size[1] * size[2]; }
};

// Rows [begin, end) of all B (P + L), those of prefix tokens zero, to `rows` [end - begin, K]; their levels to `levels`
// [end - begin, channels].
using GatherRows = void (*)(const at::Tensor& images, const Patches& p, int64_t begin, int64_t end,
                            const at::Tensor& rows, float* levels);

// For such images and rows of float, of bf16, or, of uint8 images, of bytes. uint8 pixels become pixel - 128, exactly.
GatherRows gather_rows(at::ScalarType pixels, at::ScalarType rows);

// sums [channels, C] of the contiguous fp32 or bf16 weight [C, K] over each channel.
void sum_channels(const Order& order, const at::Tensor& weight, float* sums);

}  // namespace vitfast
