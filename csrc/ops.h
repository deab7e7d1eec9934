// What ops.cpp registers and csrc/cpu and csrc/cuda implement. One declaration per op.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace vitfast {

at::Tensor patch_embed_cpu(const at::Tensor& images, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const std::optional<at::Tensor>& position, const std::optional<at::Tensor>& prefix,
                           at::IntArrayRef patch_size, bool channels_last);

at::Tensor pack_patch_embed_cpu(const at::Tensor& weight, at::IntArrayRef patch_size, bool channels_last, bool uint8);

std::string why_no_integers_cpu(const at::Tensor& weight, at::IntArrayRef patch_size, bool channels_last);

at::Tensor patch_embed_packed_cpu(const at::Tensor& images, const at::Tensor& packed,
                                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& position,
                                  const std::optional<at::Tensor>& prefix, at::IntArrayRef patch_size,
                                  bool channels_last);

// Why there is no linear in bf16 on this CPU, or "".
std::string why_no_linear_bf16_cpu();

at::Tensor pack_linear_cpu(const at::Tensor& weight);

std::vector<at::Tensor> linear_packed_cpu(const at::Tensor& x, const at::Tensor& packed,
                                          const std::optional<at::Tensor>& bias,
                                          const std::optional<std::string>& activation,
                                          const std::optional<at::Tensor>& layer_scale,
                                          const std::optional<at::Tensor>& residual,
                                          const std::optional<at::Tensor>& row_stats,
                                          const std::optional<at::Tensor>& weight_sum, double eps, bool stats);

constexpr int64_t kQuantizedLinearMaxInner = 65536;  // of K: the largest sums just fit into 32 bits

// Why there is no quantized_linear on this CPU, or "".
std::string why_no_quantized_linear_cpu();

at::Tensor pack_quantized_linear_cpu(const at::Tensor& weight);

std::vector<at::Tensor> quantized_linear_packed_cpu(const at::Tensor& x, const at::Tensor& x_scale,
                                                    const at::Tensor& packed, const at::Tensor& weight_scale,
                                                    const std::optional<at::Tensor>& bias,
                                                    const std::optional<std::string>& activation,
                                                    const std::optional<at::Tensor>& layer_scale,
                                                    const std::optional<at::Tensor>& residual, at::ScalarType dtype,
                                                    bool requantize);

std::tuple<at::Tensor, at::Tensor> quantize_cpu(const at::Tensor& x, const std::optional<at::Tensor>& norm_weight,
                                                const std::optional<at::Tensor>& norm_bias, double eps,
                                                at::ScalarType dtype);

at::Tensor layer_norm_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps);

std::tuple<at::Tensor, at::Tensor> add_layer_norm_cpu(const at::Tensor& x, const at::Tensor& residual,
                                                      const at::Tensor& weight, const at::Tensor& bias, double eps);

at::Tensor attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mask, bool causal,
                         std::optional<double> scale);

at::Tensor resample_cpu(const at::Tensor& images, const at::Tensor& first, const at::Tensor& weights, int64_t axis,
                        std::optional<int64_t> keep);

std::tuple<at::Tensor, at::Tensor> attention_quantize_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                          const std::optional<at::Tensor>& bias,
                                                          const std::optional<at::Tensor>& mask, bool causal,
                                                          std::optional<double> scale);

#ifdef VITFAST_CUDA
at::Tensor patch_embed_cuda(const at::Tensor& images, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& position, const std::optional<at::Tensor>& prefix,
                            at::IntArrayRef patch_size, bool channels_last);

at::Tensor attention_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mask, bool causal,
                          std::optional<double> scale);

// As linear_packed_cpu, but the weight is as it is.
std::vector<at::Tensor> linear_packed_cuda(const at::Tensor& x, const at::Tensor& weight,
                                           const std::optional<at::Tensor>& bias,
                                           const std::optional<std::string>& activation,
                                           const std::optional<at::Tensor>& layer_scale,
                                           const std::optional<at::Tensor>& residual,
                                           const std::optional<at::Tensor>& row_stats,
                                           const std::optional<at::Tensor>& weight_sum, double eps, bool stats);

std::vector<at::Tensor> quantized_linear_cuda(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                                              const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
                                              const std::optional<std::string>& activation,
                                              const std::optional<at::Tensor>& layer_scale,
                                              const std::optional<at::Tensor>& residual, at::ScalarType dtype,
                                              bool requantize);

// Whether this build has the kernel of both: it exists for sm_90a only.
bool linear_cuda_built();
#endif

}  // namespace vitfast
