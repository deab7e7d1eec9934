// resample on the CPU, as vitfast/images/pillow_resize.py defines it: one axis of uint8 images by weights in fixed
// point, which is how Pillow resizes. Sums are taken modulo 2^32 in any order, so that every level gives the same bits.
//
// One thread an image: decoding threads call it side by side.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../checks.h"
#include "../guards.h"
#include "../ops.h"
#include "resample_simd.h"

namespace vitfast {
namespace {

constexpr const char* kOp = "resample";
constexpr int32_t kLargest = 127 * (65536 + 256 + 1);  // what three digits of -128 .. 127 hold

uint8_t clipped(int32_t total) { return static_cast<uint8_t>(std::clamp(total >> kResampleBits, 0, 255)); }

// Along a row: out [i] = the sum of in [first [i] + k] weights [i, k].
void along_row(const ResamplePass& p, const uint8_t* in, uint8_t* out) {
  for (int64_t i = 0; i < p.length; ++i) {
    const int32_t* weights = p.weights + i * p.taps;
    for (int64_t c = 0; c < p.kept; ++c) {
      const uint8_t* from = in + p.first[i] * p.channels + c;
      uint32_t total = kResampleHalf;
      for (int64_t k = 0; k < p.taps; ++k) total += from[k * p.channels] * static_cast<uint32_t>(weights[k]);
      *out++ = clipped(static_cast<int32_t>(total));
    }
  }
}

// Across rows, for the bytes begin .. end of each.
void across_rows(const ResamplePass& p, int64_t begin, int64_t end) {
  constexpr int64_t kAtOnce = 256;
  uint32_t total[kAtOnce];
  for (int64_t i = 0; i < p.length; ++i) {
    const int32_t* weights = p.weights + i * p.taps;
    for (int64_t at = begin; at < end; at += kAtOnce) {
      const int64_t count = std::min(kAtOnce, end - at);
      std::fill_n(total, count, kResampleHalf);
      for (int64_t k = 0; k < p.taps; ++k) {
        const uint8_t* from = p.in + (p.first[i] + k) * p.in_stride + at;
        for (int64_t j = 0; j < count; ++j) total[j] += from[j] * static_cast<uint32_t>(weights[k]);
      }
      uint8_t* to = p.out + i * p.out_stride + at;
      for (int64_t j = 0; j < count; ++j) to[j] = clipped(static_cast<int32_t>(total[j]));
    }
  }
}

}  // namespace

at::Tensor resample_cpu(const at::Tensor& images, const at::Tensor& first, const at::Tensor& weights, int64_t axis,
                        std::optional<int64_t> keep) {
  check_dtype(kOp, "images", images, {at::kByte});
  check_dtype(kOp, "first", first, {at::kLong});
  check_dtype(kOp, "weights", weights, {at::kInt});
  TORCH_CHECK_VALUE(images.dim() == 4, kOp, ": images must be [B, H, W, C], got shape ", shape_text(images.sizes()));
  TORCH_CHECK_VALUE(axis == 1 || axis == 2, kOp, ": axis must be 1 or 2, got ", axis);
  TORCH_CHECK_VALUE(weights.dim() == 2, kOp, ": weights must be [out, taps], got shape ", shape_text(weights.sizes()));
  check_shape(kOp, "first", first, {weights.size(0)});
  const int64_t channels = images.size(3), kept = keep.value_or(channels);
  TORCH_CHECK_VALUE(kept == channels || (axis == 2 && 0 <= kept && kept < channels), kOp, ": keep must be ", channels,
                    axis == 2 ? " or fewer" : " for axis 1", ", got ", kept);
  const int64_t length = images.size(axis), out = weights.size(0), taps = weights.size(1);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor firsts = contiguous(kOp, "first", first), factors = contiguous(kOp, "weights", weights);
  const int64_t* from = read<int64_t>(kOp, "first", firsts);
  const int32_t* factor = read<int32_t>(kOp, "weights", factors);
  for (int64_t i = 0; i < out; ++i) {
    TORCH_CHECK_VALUE(from[i] >= 0 && from[i] <= length - taps, kOp, ": first[", i, "] is ", from[i], ", and ", taps,
                      " taps from there do not lie within 0 .. ", length);
  }
  for (int64_t i = 0; i < factors.numel(); ++i) {
    TORCH_CHECK_VALUE(-kLargest <= factor[i] && factor[i] <= kLargest, kOp, ": a weight is ", factor[i],
                      ", allowed are -", kLargest, " .. ", kLargest);
  }
  // Rows may be apart, as they are in a crop; copied if anything else is.
  const bool whole_rows = images.stride(3) == 1 && images.stride(2) == channels;
  const at::Tensor source = whole_rows ? images : contiguous(kOp, "images", images);
  const auto* pixels = static_cast<const uint8_t*>(read(kOp, "images", source));
  std::vector<int64_t> shape(images.sizes().vec());
  shape[axis] = out;
  shape[3] = kept;
  product(kOp, shape);
  const at::Tensor result = at::empty(shape, images.options());
  if (result.numel() == 0) return result;

  const ResamplePass pass{
      nullptr, nullptr, source.stride(1), result.stride(1), images.size(1), images.size(2), channels, kept, out, from,
      factor,  taps};
#ifdef VITFAST_SIMD_LEVELS
  const std::optional<ResampleWords> words = resample_words(pass, axis == 1, length);
#endif
  auto* output = result.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, images.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      ResamplePass one = pass;
      one.in = pixels + b * source.stride(0);
      one.out = output + b * result.stride(0);
#ifdef VITFAST_SIMD_LEVELS
      if (words && resample_simd(one, axis == 1, *words)) continue;
#endif
      if (axis == 1) {
        across_rows(one, 0, one.columns * one.channels);
      } else {
        for (int64_t r = 0; r < one.rows; ++r) along_row(one, one.in + r * one.in_stride, one.out + r * one.out_stride);
      }
    }
  });
  return result;
}

}  // namespace vitfast
