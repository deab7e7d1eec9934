#include "patches.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../guards.h"
#include "simd.h"

namespace vitfast {
namespace {

constexpr float kPixelCenter = 128.0f;

constexpr const char* kOp = "patch_embed";

template <typename row_t, typename pixel_t>
VITFAST_INLINE auto row_value(pixel_t pixel) {
  if constexpr (std::is_same_v<row_t, uint8_t>) {
    return pixel;
  } else if constexpr (std::is_same_v<pixel_t, uint8_t>) {
    return static_cast<float>(static_cast<int32_t>(pixel)) - kPixelCenter;
  } else {
    return static_cast<float>(pixel);
  }
}

template <typename pixel_t, typename row_t>
VITFAST_INLINE void gather_loop(const pixel_t* patch, const Patches& p, row_t* row) {
  for (int64_t i = 0; i < p.size[0]; ++i) {
    for (int64_t j = 0; j < p.size[1]; ++j, row += p.size[2]) {
      const pixel_t* run = patch + i * p.stride[0] + j * p.stride[1];
      if (p.stride[2] == 1 && std::is_same_v<pixel_t, row_t>) {
        std::memcpy(row, run, p.size[2] * sizeof(row_t));  // a run of bytes is shorter than a loop's vectors
      } else if (p.stride[2] == 1) {
        for (int64_t k = 0; k < p.size[2]; ++k) row[k] = row_value<row_t>(run[k]);
      } else {
        for (int64_t k = 0; k < p.size[2]; ++k) row[k] = row_value<row_t>(run[k * p.stride[2]]);
      }
    }
  }
}

// One patch as a row of K numbers. The pixel types that matter get a clone per vector width.
VITFAST_SIMD void gather(const uint8_t* patch, const Patches& p, float* row) { gather_loop(patch, p, row); }
VITFAST_SIMD void gather(const float* patch, const Patches& p, float* row) { gather_loop(patch, p, row); }
VITFAST_SIMD void gather(const uint8_t* patch, const Patches& p, uint8_t* row) { gather_loop(patch, p, row); }
VITFAST_SIMD void gather(const uint8_t* patch, const Patches& p, at::BFloat16* row) { gather_loop(patch, p, row); }
VITFAST_SIMD void gather(const float* patch, const Patches& p, at::BFloat16* row) { gather_loop(patch, p, row); }
template <typename pixel_t, typename row_t>
void gather(const pixel_t* patch, const Patches& p, row_t* row) {
  gather_loop(patch, p, row);
}

// The sums [channels] of a row [K] over each channel; `run` [width] is memory.
template <typename row_t, typename sum_t>
VITFAST_INLINE void sum_runs(const Order& order, const row_t* row, int64_t k, sum_t* run, sum_t* sums) {
  const int64_t parts = order.interleaved ? 1 : order.channels, part = k / parts;
  std::fill(sums, sums + order.channels, sum_t(0));
  for (int64_t c = 0; c < parts; ++c, row += part) {
    std::fill(run, run + order.width, sum_t(0));
    for (int64_t i = 0; i < part; i += order.width) {
      for (int64_t j = 0; j < order.width; ++j) run[j] += static_cast<float>(row[i + j]);
    }
    for (int64_t j = 0, channel = c; j < order.width; ++j, channel = order.after(channel)) sums[channel] += run[j];
  }
}

// row [K] -= level [channels], the mean of each channel, whole for uint8 pixels, whose differences are exact then.
template <typename row_t>
VITFAST_INLINE void center_loop(const Order& order, bool whole, row_t* row, float* level, float* run, int64_t k) {
  sum_runs(order, row, k, run, level);
  for (int64_t c = 0; c < order.channels; ++c) {
    level[c] *= static_cast<float>(order.channels) / static_cast<float>(k);
    if (whole) level[c] = std::nearbyint(level[c]);
  }
  const int64_t parts = order.interleaved ? 1 : order.channels, part = k / parts;
  for (int64_t c = 0; c < parts; ++c, row += part) {
    for (int64_t j = 0, channel = c; j < order.width; ++j, channel = order.after(channel)) run[j] = level[channel];
    for (int64_t i = 0; i < part; i += order.width) {
      for (int64_t j = 0; j < order.width; ++j) row[i + j] = static_cast<float>(row[i + j]) - run[j];
    }
  }
}
VITFAST_SIMD void center(const Order& order, bool whole, float* row, float* level, float* run, int64_t k) {
  center_loop(order, whole, row, level, run, k);
}
VITFAST_SIMD void center(const Order& order, bool whole, at::BFloat16* row, float* level, float* run, int64_t k) {
  center_loop(order, whole, row, level, run, k);
}

// level [channels] = the last pixel of each channel.
void last_pixels(const Order& order, const uint8_t* row, int64_t k, float* level) {
  for (int64_t c = 0; c < order.channels; ++c) {
    const int64_t last = order.interleaved ? k - order.channels + c : (c + 1) * (k / order.channels) - 1;
    level[c] = row_value<float>(row[last]);
  }
}

template <typename pixel_t, typename row_t>
void gather_rows_of(const at::Tensor& images, const Patches& p, int64_t begin, int64_t end, const at::Tensor& rows,
                    float* levels) {
  const int64_t k = p.inner(), stride = rows.size(1);
  const pixel_t* data = read<pixel_t>(kOp, "images", images);
  row_t* row = rows.mutable_data_ptr<row_t>();
  std::vector<float> run(p.order.width);  // no longer than a row
  for (int64_t r = begin; r < end; ++r, row += stride, levels += p.order.channels) {
    const int64_t patch = r % p.tokens() - p.prefix;
    std::fill(row + (patch < 0 ? 0 : k), row + stride, row_t(0));
    if (patch < 0) continue;
    const pixel_t* image = data + r / p.tokens() * p.image_stride;
    gather(image + patch / p.grid_w * p.down + patch % p.grid_w * p.right, p, row);
    if constexpr (std::is_same_v<row_t, uint8_t>) {
      last_pixels(p.order, row, k, levels);
    } else {
      center(p.order, std::is_same_v<pixel_t, uint8_t>, row, levels, run.data(), k);
    }
  }
}

template <typename row_t>
GatherRows gather_to(at::ScalarType pixels) {
  return AT_DISPATCH_SWITCH(pixels, kOp,
                            AT_DISPATCH_CASE(at::kByte, [] { return &gather_rows_of<scalar_t, row_t>; })
                                AT_DISPATCH_CASE_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16,
                                                                     [] { return &gather_rows_of<scalar_t, row_t>; }));
}

// Of a row [K] of the weight, in double precision.
VITFAST_SIMD void sum_row(const Order& order, const float* row, int64_t k, double* run, double* sums) {
  sum_runs(order, row, k, run, sums);
}
VITFAST_SIMD void sum_row(const Order& order, const at::BFloat16* row, int64_t k, double* run, double* sums) {
  sum_runs(order, row, k, run, sums);
}
template <typename row_t>
void sum_rows(const Order& order, const at::Tensor& weight, float* sums) {
  const int64_t n = weight.size(0), k = weight.size(1);
  if (weight.numel() == 0) return;
  const row_t* data = read<row_t>(kOp, "weight", weight);
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> run(order.width), sum(order.channels);
    for (int64_t i = begin; i < end; ++i) {
      sum_row(order, data + i * k, k, run.data(), sum.data());
      for (int64_t c = 0; c < order.channels; ++c) sums[c * n + i] = static_cast<float>(sum[c]);
    }
  });
}

}  // namespace

Patches::Patches(const at::Tensor& images, at::IntArrayRef patch_size, bool channels_last,
                 const std::optional<at::Tensor>& prefix_tokens)
    : order(images.size(channels_last ? 3 : 1), patch_size[1], channels_last),
      batch(images.size(0)),
      prefix(prefix_tokens ? prefix_tokens->size(0) : 0),
      grid_h(images.size(channels_last ? 1 : 2) / patch_size[0]),
      grid_w(images.size(channels_last ? 2 : 3) / patch_size[1]),
      image_stride(images.stride(0)) {
  const int64_t h = channels_last ? 1 : 2, w = h + 1, c = channels_last ? 3 : 1;
  const int64_t ph = patch_size[0], pw = patch_size[1], channels = order.channels;
  const int64_t sh = images.stride(h), sw = images.stride(w), sc = images.stride(c);
  down = ph * sh, right = pw * sw;
  if (channels_last && sc == 1 && sw == channels) {  // a row of the patch is one run
    size = {1, ph, pw * channels};
    stride = {0, sh, 1};
  } else if (channels_last) {
    size = {ph, pw, channels};
    stride = {sh, sw, sc};
  } else {
    size = {channels, ph, pw};
    stride = {sc, sh, sw};
  }
}

GatherRows gather_rows(at::ScalarType pixels, at::ScalarType rows) {
  if (rows == at::kByte) return &gather_rows_of<uint8_t, uint8_t>;
  return rows == at::kBFloat16 ? gather_to<at::BFloat16>(pixels) : gather_to<float>(pixels);
}

void sum_channels(const Order& order, const at::Tensor& weight, float* sums) {
  (weight.scalar_type() == at::kFloat ? &sum_rows<float> : &sum_rows<at::BFloat16>)(order, weight, sums);
}

}  // namespace vitfast
