// What linear and quantized_linear on CUDA ask of their arguments, and of the GPU, in common.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <optional>
#include <string>

#include "../checks.h"
#include "../guards.h"
#include "../ops.h"
#include "linear.h"

namespace vitfast {

using Optional = std::optional<at::Tensor>;
constexpr const char* kActivations[] = {"none", "gelu", "gelu_tanh", "quick_gelu", "silu"};  // as LinearActivation

inline LinearActivation activation_of(const char* op, const std::optional<std::string>& name, const char* more) {
  if (!name) return LinearActivation::none;
  for (size_t i = 1; i < std::size(kActivations); ++i) {
    if (*name == kActivations[i]) return static_cast<LinearActivation>(i);
  }
  TORCH_CHECK_VALUE(false, op, ": activation must be one of gelu, gelu_tanh, quick_gelu, silu", more, " or None, got '",
                    *name, "'");
}

// [..., K] as rows at one stride, which must be aligned: TMA moves 16 bytes at a time.
inline int64_t row_stride(const char* op, const char* name, const at::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, width = tensor.size(last);
  TORCH_CHECK_VALUE(width <= 1 || tensor.stride(last) == 1, op, ": the last axis of ", name, " has stride ",
                    tensor.stride(last), ", expected 1");
  int64_t stride = 0, rows = 1;  // of the axes seen so far
  for (int64_t axis = last - 1; axis >= 0; --axis) {
    if (tensor.size(axis) == 1) continue;
    TORCH_CHECK_VALUE(rows == 1 || tensor.stride(axis) == stride * rows, op, ": ", name, " with shape ",
                      shape_text(tensor.sizes()), " and strides ", shape_text(tensor.strides()),
                      " cannot be viewed as rows");
    if (rows == 1) stride = tensor.stride(axis);
    rows *= tensor.size(axis);
  }
  if (rows == 1) stride = width;
  check_storage(op, name, tensor);
  TORCH_CHECK_VALUE(is_aligned(tensor, 16) && stride % (16 / tensor.element_size()) == 0 && stride >= width, op,
                    ": the rows of ", name, " with strides ", shape_text(tensor.strides()),
                    " are not all aligned to 16 bytes");
  return stride;
}

// A vector, or the statistics, which the kernel reads by two elements at a time.
inline void check_pairs(const char* op, const char* name, const Optional& tensor) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(tensor->is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
                    shape_text(tensor->strides()));
  check_storage(op, name, *tensor);
  const int64_t bytes = 2 * tensor->element_size();
  TORCH_CHECK_VALUE(is_aligned(*tensor, bytes), op, ": ", name, " is not aligned to ", bytes, " bytes");
}

// In the words of kernels/_common.py, as all that follows.
inline void check_on_device(const char* op, const char* name, const Optional& tensor, const at::Tensor& x) {
  TORCH_CHECK_VALUE(!tensor || tensor->device() == x.device(), op, ": ", name, " is on ", tensor->device(),
                    ", but x is on ", x.device(), "; all must be on one device");
}

// `multiple`: of N and K.
inline void check_sizes(const char* op, const at::Tensor& x, const at::Tensor& weight, int multiple) {
  const int64_t n = weight.size(0), k = weight.size(1), m = rows_of(op, x);
  TORCH_CHECK_VALUE(n % multiple == 0 && k % multiple == 0, op, ": N and K must be multiples of ", multiple,
                    " on CUDA, got ", n, " and ", k);
  TORCH_CHECK_VALUE(std::max({m, n, k}) <= std::numeric_limits<int>::max() - 256 &&
                        linear_tiles(m, n, 128) <= std::numeric_limits<int>::max() / 2,
                    op, ": x of shape ", shape_text(x.sizes()), " is too large for the CUDA kernel");
}

// Multiprocessors of the current device, for which the kernel must be built.
inline int processors_of_sm_90a(const char* op) {
  TORCH_CHECK_VALUE(linear_cuda_built(), op, ": the extension is built for ", VITFAST_CUDA_STATE,
                    "; the CUDA kernel needs 90a (VITFAST_CUDA_ARCHS=90a)");
  int device = 0, major = 0, minor = 0, processors = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  TORCH_CHECK_VALUE(major == 9 && minor == 0, op, ": the CUDA kernel needs compute capability 9.0, this GPU has ",
                    major, ".", minor);
  return processors;
}

}  // namespace vitfast
