// Argument checks of patch_embed, on the CPU as on CUDA; errors read like those of vitfast/ops/checks.py.
#pragma once

#include "checks.h"
#include "guards.h"

namespace vitfast {

inline void check_patch_size(const char* op, at::IntArrayRef patch_size) {
  TORCH_CHECK_VALUE(patch_size.size() == 2, op, ": patch_size must be (height, width), got ", shape_text(patch_size));
}

// Columns of a weight [C, K] packed for uint8 images, in bytes: three a number; 4 a channel and 16 more.
inline int64_t pixel_columns(int64_t k, int64_t channels) {
  const char* op = "patch_embed";
  return (Size(op, k) * 3 + Size(op, channels) * 4 + 16).value();
}

// Columns of a bf16 weight [C, K] packed in pairs: K rounded up to whole ones, and two a channel.
inline int64_t pairs_columns(int64_t k, int64_t channels) {
  const char* op = "patch_embed";
  return (Size(op, k) + k % 2 + Size(op, channels) * 2).value();
}

// The rows of the output, B (P + L). `packed`: the weight is one of pack_patch_embed: of bytes, in pairs of bf16, or
// its K is followed by a column per channel.
inline int64_t check_patch_embed(const at::Tensor& images, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& position,
                                 const std::optional<at::Tensor>& prefix, at::IntArrayRef patch_size,
                                 bool channels_last, std::initializer_list<at::ScalarType> weight_dtypes,
                                 bool packed = false) {
  const char* op = "patch_embed";
  check_dtype(op, "images", images, {at::kByte, at::kFloat, at::kHalf, at::kBFloat16, at::kDouble});
  check_dtype(op, "weight", weight, weight_dtypes);
  const char* layout = channels_last ? "[B, H, W, Cin]" : "[B, Cin, H, W]";
  TORCH_CHECK_VALUE(images.dim() == 4, op, ": images must be ", layout, ", got shape ", shape_text(images.sizes()));
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight must be [C, K] (see pack_patch_embed), got shape ",
                    shape_text(weight.sizes()));
  check_patch_size(op, patch_size);
  const int64_t ph = patch_size[0], pw = patch_size[1];
  const int64_t height = images.size(channels_last ? 1 : 2), width = images.size(channels_last ? 2 : 3);
  const int64_t channels = images.size(channels_last ? 3 : 1), columns = weight.size(1);
  const bool bytes = packed && weight.scalar_type() == at::kChar;
  const bool pairs = packed && weight.scalar_type() == at::kBFloat16;
  TORCH_CHECK_VALUE(ph >= 1 && pw >= 1 && height >= ph && width >= pw && height % ph == 0 && width % pw == 0, op,
                    ": image size ", height, "x", width, " is not a positive multiple of the patch ", ph, "x", pw);
  TORCH_CHECK_VALUE(channels >= 1, op, ": images ", layout, " of shape ", shape_text(images.sizes()),
                    " have no channels");
  const int64_t k = product(op, {channels, ph, pw});
  int64_t beside = packed ? channels : 0;  // columns beyond K, or 3 K of bytes
  if (bytes) beside = pixel_columns(0, channels);
  if (pairs) beside = pairs_columns(k, channels) - k;
  TORCH_CHECK_VALUE(columns == (Size(op, k) * (bytes ? 3 : 1) + beside).value(), op, ": images ", layout, " of shape ",
                    shape_text(images.sizes()), " have ", channels, " channels, so weight needs K = ", channels, "*",
                    ph, "*", pw, " = ", k, ", got ", (columns - beside) / (bytes ? 3 : 1));
  const int64_t c = weight.size(0), patches = product(op, {height / ph, width / pw});
  check_shape(op, "bias", bias, {c});
  check_shape(op, "position", position, {patches, c});
  TORCH_CHECK_VALUE(!prefix || (prefix->dim() == 2 && prefix->size(1) == c), op, ": prefix has shape ",
                    shape_text(prefix->sizes()), ", expected (P, ", c, ")");
  const at::ScalarType dtype = bytes ? at::kFloat : weight.scalar_type();
  if (bias) check_dtype(op, "bias", *bias, {dtype});
  if (position) check_dtype(op, "position", *position, {dtype});
  if (prefix) check_dtype(op, "prefix", *prefix, {dtype});
  return ((Size(op, patches) + (prefix ? prefix->size(0) : 0)) * images.size(0)).value();
}

}  // namespace vitfast
