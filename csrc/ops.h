// What ops.cpp registers and csrc/cpu and csrc/cuda implement. One declaration per op.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace vitfast {

at::Tensor patch_embed_cpu(const at::Tensor& images, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const std::optional<at::Tensor>& position, const std::optional<at::Tensor>& prefix,
                           at::IntArrayRef patch_size, bool channels_last);

at::Tensor layer_norm_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps);

std::tuple<at::Tensor, at::Tensor> add_layer_norm_cpu(const at::Tensor& x, const at::Tensor& residual,
                                                      const at::Tensor& weight, const at::Tensor& bias, double eps);

at::Tensor attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mask, bool causal,
                         std::optional<double> scale);

#ifdef VITFAST_CUDA
at::Tensor attention_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mask, bool causal,
                          std::optional<double> scale);
#endif

}  // namespace vitfast
