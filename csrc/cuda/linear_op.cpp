// linear on CUDA devices of compute capability 9.0: what the kernel asks of its arguments, and its launch on torch's
// stream. The weight is not packed: the kernel reads it as it is.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "linear.h"

namespace vitfast {
namespace {

using Optional = std::optional<at::Tensor>;
constexpr const char* op = "linear";
constexpr const char* kActivations[] = {"none", "gelu", "gelu_tanh", "quick_gelu", "silu"};  // as LinearActivation

LinearActivation activation_of(const std::optional<std::string>& name) {
  if (!name) return LinearActivation::none;
  for (size_t i = 1; i < std::size(kActivations); ++i) {
    if (*name == kActivations[i]) return static_cast<LinearActivation>(i);
  }
  // swiglu is made of two calls, in vitfast/ops/native.py.
  TORCH_CHECK_VALUE(false, op, ": activation must be one of gelu, gelu_tanh, quick_gelu, silu, swiglu or None, got '",
                    *name, "'");
}

// [..., K] as rows at one stride, which must be aligned: TMA moves 16 bytes at a time.
int64_t row_stride(const char* name, const at::Tensor& tensor) {
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
  TORCH_CHECK_VALUE(
      reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && stride % 8 == 0 && stride >= width, op,
      ": the rows of ", name, " with strides ", shape_text(tensor.strides()), " are not all aligned to 16 bytes");
  return stride;
}

// A vector, or the statistics, which the kernel reads by two elements at a time.
void check_pairs(const char* name, const Optional& tensor) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(tensor->is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
                    shape_text(tensor->strides()));
  const auto bytes = static_cast<uintptr_t>(2 * tensor->element_size());
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % bytes == 0, op, ": ", name,
                    " is not aligned to ", bytes, " bytes");
}

// In the words of kernels/linear.py.
void check(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, const Optional& layer_scale,
           const Optional& residual, const Optional& row_stats, const Optional& weight_sum) {
  const std::pair<const char*, const Optional&> like_x[] = {
      {"weight", weight}, {"bias", bias}, {"layer_scale", layer_scale}, {"residual", residual}};
  const std::pair<const char*, const Optional&> in_fp32[] = {{"row_stats", row_stats}, {"weight_sum", weight_sum}};
  const auto check_device = [&x](const char* name, const Optional& tensor) {
    TORCH_CHECK_VALUE(!tensor || tensor->device() == x.device(), op, ": ", name, " is on ", tensor->device(),
                      ", but x is on ", x.device(), "; all must be on one device");
  };
  for (const auto& [name, tensor] : like_x) check_device(name, tensor);
  for (const auto& [name, tensor] : in_fp32) check_device(name, tensor);
  check_dtype(op, "x", x, {at::kHalf, at::kBFloat16});
  TORCH_CHECK_VALUE(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1) && x.size(-1) >= 1, op,
                    ": x [..., K] and weight [N, K] with K >= 1 do not fit: ", shape_text(x.sizes()), " and ",
                    shape_text(weight.sizes()));
  const int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k;
  check_shape(op, "bias", bias, {n});
  check_shape(op, "layer_scale", layer_scale, {n});
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  check_shape(op, "residual", residual, shape);
  TORCH_CHECK_VALUE(row_stats.has_value() == weight_sum.has_value(), op,
                    ": row_stats and weight_sum go together (see fold_norm); only one was given");
  check_shape(op, "row_stats", row_stats, {m, (k + kLinearStats - 1) / kLinearStats, 2});
  check_shape(op, "weight_sum", weight_sum, {n});
  for (const auto& [name, tensor] : like_x) {
    if (tensor) check_dtype(op, name, *tensor, {x.scalar_type()});
  }
  for (const auto& [name, tensor] : in_fp32) {
    if (tensor) check_dtype(op, name, *tensor, {at::kFloat});
  }
  for (const auto& [name, tensor] : {like_x[1], like_x[2], in_fp32[0], in_fp32[1]}) check_pairs(name, tensor);
  TORCH_CHECK_VALUE(n % kLinearMultiple == 0 && k % kLinearMultiple == 0, op, ": N and K must be multiples of ",
                    kLinearMultiple, " on CUDA, got ", n, " and ", k);
  TORCH_CHECK_VALUE(std::max({m, n, k}) <= std::numeric_limits<int>::max() - 256 &&
                        linear_tiles(m, n, 128) <= std::numeric_limits<int>::max() / 2,
                    op, ": x of shape ", shape_text(x.sizes()), " is too large for the CUDA kernel");
}

template <typename T = void>
const T* pointer(const Optional& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace

bool linear_cuda_built() { return std::strstr(VITFAST_CUDA_STATE, "90a") != nullptr; }

std::vector<at::Tensor> linear_packed_cuda(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                                           const std::optional<std::string>& activation, const Optional& layer_scale,
                                           const Optional& residual, const Optional& row_stats,
                                           const Optional& weight_sum, double eps, bool stats) {
  TORCH_CHECK_VALUE(linear_cuda_built(), op, ": the extension is built for ", VITFAST_CUDA_STATE,
                    "; the CUDA kernel needs 90a (VITFAST_CUDA_ARCHS=90a)");
  check(x, weight, bias, layer_scale, residual, row_stats, weight_sum);
  const LinearActivation chosen = activation_of(activation);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard guard(x.device());
  int major = 0, minor = 0, processors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.device().index()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.device().index()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.device().index()));
  TORCH_CHECK_VALUE(major == 9 && minor == 0, op, ": the CUDA kernel needs compute capability 9.0, this GPU has ",
                    major, ".", minor);

  const int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  std::vector<at::Tensor> result{at::empty(shape, x.options())};
  if (stats) {
    result.push_back(at::empty({m, (n + kLinearStats - 1) / kLinearStats, 2}, x.options().dtype(at::kFloat)));
  }
  if (m == 0 || n == 0) return result;

  const LinearCall call{x.const_data_ptr(),
                        weight.const_data_ptr(),
                        result[0].mutable_data_ptr(),
                        pointer(residual),
                        pointer(bias),
                        pointer(layer_scale),
                        pointer<float>(row_stats),
                        pointer<float>(weight_sum),
                        stats ? result[1].mutable_data_ptr<float>() : nullptr,
                        row_stride("x", x),
                        row_stride("weight", weight),
                        residual ? row_stride("residual", *residual) : 0,
                        static_cast<int>(m),
                        static_cast<int>(n),
                        static_cast<int>(k),
                        chosen,
                        static_cast<float>(eps)};
  const LinearType type = x.scalar_type() == at::kHalf ? LinearType::fp16 : LinearType::bf16;
  const int error = linear_launch(type, call, processors, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
  return result;
}

}  // namespace vitfast
