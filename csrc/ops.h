// What ops.cpp registers and csrc/cpu implements. One declaration per op.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace vitfast {

at::Tensor patch_embed_cpu(const at::Tensor& images, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const std::optional<at::Tensor>& position, const std::optional<at::Tensor>& prefix,
                           at::IntArrayRef patch_size, bool channels_last);

}  // namespace vitfast
