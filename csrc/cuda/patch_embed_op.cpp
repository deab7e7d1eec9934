// patch_embed on CUDA devices: what the kernel asks of its arguments, and its launch on torch's stream.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <utility>

#include "../guards.h"
#include "../ops.h"
#include "../patch_embed_checks.h"
#include "patch_embed.h"

namespace vitfast {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr const char* kOp = "patch_embed";

void check(const at::Tensor& images, const at::Tensor& weight, const Optional& bias, const Optional& position,
           const Optional& prefix, at::IntArrayRef patch_size, bool channels_last) {
  const int64_t rows =
      check_patch_embed(images, weight, bias, position, prefix, patch_size, channels_last, {at::kBFloat16});
  check_dtype(kOp, "images", images, {at::kByte, at::kBFloat16});
  const std::pair<const char*, const Optional> others[] = {
      {"weight", weight}, {"bias", bias}, {"position", position}, {"prefix", prefix}};
  for (const auto& [name, tensor] : others) {
    TORCH_CHECK_VALUE(!tensor || tensor->device() == images.device(), kOp, ": ", name, " must be on ", images.device(),
                      " like images, got ", tensor->device());
  }
  TORCH_CHECK_VALUE(weight.size(0) % 2 == 0, kOp, ": the CUDA kernel needs an even number of weight rows, got ",
                    weight.size(0));
  TORCH_CHECK_VALUE(rows <= std::numeric_limits<int>::max() / 2 && weight.numel() <= std::numeric_limits<int>::max(),
                    kOp, ": images of shape ", shape_text(images.sizes()), " with a weight of ",
                    shape_text(weight.sizes()), " are too large for the CUDA kernel");
}

// As the kernel reads them: contiguous, from an address that is a multiple of 4.
Optional pairs_of(const char* name, const Optional& tensor) {
  return tensor && tensor->numel() ? Optional(contiguous(kOp, name, *tensor, 4)) : std::nullopt;
}

}  // namespace

at::Tensor patch_embed_cuda(const at::Tensor& images, const at::Tensor& weight, const Optional& bias,
                            const Optional& position, const Optional& prefix, at::IntArrayRef patch_size,
                            bool channels_last) {
  check(images, weight, bias, position, prefix, patch_size, channels_last);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard guard(images.device());
  const int64_t h = channels_last ? 1 : 2, w = h + 1, c = channels_last ? 3 : 1;
  const int64_t ph = patch_size[0], pw = patch_size[1], channels = images.size(c);
  const int64_t down = images.stride(h), right = images.stride(w), across = images.stride(c);
  const int64_t grid_width = images.size(w) / pw, prefix_tokens = prefix ? prefix->size(0) : 0;
  const int64_t tokens = prefix_tokens + images.size(h) / ph * grid_width, k = weight.size(1);
  const at::Tensor out = at::empty({images.size(0), tokens, weight.size(0)}, weight.options());
  if (out.numel() == 0) return out;

  // Copied if need be, unlike the images: they are small, and as they should be already in a planned model whose K is
  // a multiple of 8.
  check_storage(kOp, "weight", weight);
  const at::Tensor padded = k % 8 ? at::constant_pad_nd(weight, {0, 8 - k % 8}) : weight;
  const at::Tensor kernel = contiguous(kOp, "weight", padded, 16);
  const Optional b = pairs_of("bias", bias), pos = pairs_of("position", position), pre = pairs_of("prefix", prefix);
  PatchEmbedParams params{};
  params.images = read(kOp, "images", images);
  params.weight = read(kOp, "weight", kernel);
  params.bias = read(kOp, "bias", b);
  params.position = read(kOp, "position", pos);
  params.prefix = read(kOp, "prefix", pre);
  params.out = out.mutable_data_ptr();
  params.image_stride = images.stride(0);
  params.down = ph * down;
  params.right = pw * right;
  // Channels next to each other, pixel after pixel, make one axis with the patch's columns.
  const bool joined = channels_last && right == channels * across;
  const auto axes = [&params](int64_t outer, int64_t middle, int64_t inner, int64_t middle_size, int64_t inner_size) {
    params.outer_stride = outer, params.middle_stride = middle, params.inner_stride = inner;
    params.middle = static_cast<int>(middle_size), params.inner = static_cast<int>(inner_size);
  };
  if (joined) {
    axes(0, down, across, ph, pw * channels);
  } else if (channels_last) {
    axes(down, right, across, pw, channels);
  } else {
    axes(across, down, right, ph, pw);
  }
  params.rows = static_cast<int>(images.size(0) * tokens);
  params.tokens = static_cast<int>(tokens);
  params.prefix_tokens = static_cast<int>(prefix_tokens);
  params.grid_width = static_cast<int>(grid_width);
  params.width = static_cast<int>(weight.size(0));
  params.k = static_cast<int>(k);
  params.weight_stride = static_cast<int>(kernel.size(1));
  bool pairs = params.inner % 2 == 0 && params.inner_stride == 1 &&
               reinterpret_cast<uintptr_t>(params.images) % (2 * images.element_size()) == 0;
  for (int64_t stride : {params.image_stride, params.down, params.right, params.outer_stride, params.middle_stride}) {
    pairs &= stride % 2 == 0;
  }
  params.pairs = pairs;
  const PixelType type = images.scalar_type() == at::kByte ? PixelType::uint8 : PixelType::bf16;
  const int error = patch_embed_launch(type, params, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
  return out;
}

}  // namespace vitfast
