// quantized_linear on CUDA devices of compute capability 9.0, e4m3 only: what it asks of its arguments, and the launch
// of the linear kernel on torch's stream.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <utility>
#include <vector>

#include "linear_op.h"

namespace vitfast {
namespace {

constexpr const char* op = "quantized_linear";

// In the words of kernels/quantized_linear.py.
void check(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight, const at::Tensor& weight_scale,
           const Optional& bias, const Optional& layer_scale, const Optional& residual, at::ScalarType dtype) {
  const std::pair<const char*, const Optional&> in_dtype[] = {
      {"bias", bias}, {"layer_scale", layer_scale}, {"residual", residual}};
  check_on_device(op, "x_scale", x_scale, x);
  check_on_device(op, "weight", weight, x);
  check_on_device(op, "weight_scale", weight_scale, x);
  for (const auto& [name, tensor] : in_dtype) check_on_device(op, name, tensor, x);
  check_dtype(op, "x", x, {at::kFloat8_e4m3fn});
  check_dtype(op, "weight", weight, {x.scalar_type()});
  check_dtype(op, "x_scale", x_scale, {at::kFloat});
  check_dtype(op, "weight_scale", weight_scale, {at::kFloat});
  for (const auto& [name, tensor] : in_dtype) {
    if (tensor) check_dtype(op, name, *tensor, {dtype});
  }
  TORCH_CHECK_VALUE(dtype == at::kHalf || dtype == at::kBFloat16, op,
                    ": dtype must be torch.float16 or torch.bfloat16 on CUDA, got ", dtype_text(dtype));
  TORCH_CHECK_VALUE(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1) && x.size(-1) >= 1, op,
                    ": x [..., K] and weight [N, K] with K >= 1 do not fit: ", shape_text(x.sizes()), " and ",
                    shape_text(weight.sizes()));
  const int64_t n = weight.size(0), k = weight.size(1);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = (k + kLinearScales - 1) / kLinearScales;
  if (x_scale.dim() != x.dim()) shape.pop_back();
  check_shape(op, "x_scale", x_scale, shape);
  check_shape(op, "weight_scale", weight_scale, {n});
  check_shape(op, "bias", bias, {n});
  check_shape(op, "layer_scale", layer_scale, {n});
  shape = x.sizes().vec();
  shape.back() = n;
  check_shape(op, "residual", residual, shape);
  TORCH_CHECK_VALUE(x_scale.is_contiguous(), op, ": x_scale must be contiguous, got strides ",
                    shape_text(x_scale.strides()));
  check_pairs(op, "weight_scale", weight_scale);
  check_pairs(op, "bias", bias);
  check_pairs(op, "layer_scale", layer_scale);
  check_sizes(op, x, weight, kQuantizedMultiple);
}

}  // namespace

std::vector<at::Tensor> quantized_linear_cuda(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                                              const at::Tensor& weight_scale, const Optional& bias,
                                              const std::optional<std::string>& activation, const Optional& layer_scale,
                                              const Optional& residual, at::ScalarType dtype, bool requantize) {
  const LinearActivation chosen = activation_of(op, activation, "");
  check(x, x_scale, weight, weight_scale, bias, layer_scale, residual, dtype);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard guard(x.device());
  const int processors = processors_of_sm_90a(op);

  const int64_t n = weight.size(0), k = weight.size(1), m = rows_of(op, x);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  std::vector<at::Tensor> result{at::empty(shape, x.options().dtype(requantize ? x.scalar_type() : dtype))};
  if (requantize) {
    shape.back() = (n + kLinearScales - 1) / kLinearScales;
    result.push_back(at::empty(shape, x_scale.options()));
  }
  if (m == 0 || n == 0) return result;

  LinearCall call{};
  call.x = read(op, "x", x), call.x_stride = row_stride(op, "x", x);
  call.weight = read(op, "weight", weight), call.weight_stride = row_stride(op, "weight", weight);
  call.x_scale = read<float>(op, "x_scale", x_scale);
  call.weight_scale = read<float>(op, "weight_scale", weight_scale);
  call.x_groups = static_cast<int>(x_scale.numel() / m);
  call.residual = read(op, "residual", residual),
  call.residual_stride = residual ? row_stride(op, "residual", *residual) : 0;
  call.bias = read(op, "bias", bias), call.layer_scale = read(op, "layer_scale", layer_scale);
  call.y = result[0].mutable_data_ptr(), call.y_scale = requantize ? result[1].mutable_data_ptr<float>() : nullptr;
  call.m = static_cast<int>(m), call.n = static_cast<int>(n), call.k = static_cast<int>(k);
  call.activation = chosen;
  const LinearType type = dtype == at::kHalf ? LinearType::fp16 : LinearType::bf16;
  const int error = linear_launch(type, call, processors, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
  return result;
}

}  // namespace vitfast
