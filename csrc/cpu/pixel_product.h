// The product of uint8 pixels with an fp32 weight by exact integer products, for patch_embed on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace vitfast {

// The order of the K axis of patch_embed, which is made of runs of `width` numbers: of one channel each, or of all,
// interleaved.
struct Order {
  int64_t channels, width;
  bool interleaved;

  Order(int64_t channels, int64_t patch_width, bool channels_last)
      : channels(channels), width(channels_last ? patch_width * channels : patch_width), interleaved(channels_last) {}

  // The channel of the next number of a run.
  int64_t after(int64_t channel) const { return !interleaved ? channel : channel + 1 < channels ? channel + 1 : 0; }
};

// Why this CPU does not multiply rows of K pixels by integer products, or "".
std::string why_no_pixel_product(int64_t k);

// Packs the contiguous fp32 weight [N, K] to [N, pixel_columns(K)] bytes. Or says why not: this CPU, K or the weight's
// values rule integer products out, and `packed` is of no use.
std::string pack_pixel_weight(const Order& order, const at::Tensor& weight, int8_t* packed);

// y [rows, N] = (x - 128) [rows, K] weight^T on the calling thread alone, but for `pixel_rest`; x and y are contiguous.
void multiply_pixels(const uint8_t* x, int64_t rows, int64_t n, int64_t k, const int8_t* packed, float* y);

// [channels, N]: what is to be added to y for each unit by which the last pixel of a channel differs from 128.
const float* pixel_rest(int64_t n, int64_t k, const int8_t* packed);

}  // namespace vitfast
