// linear on CUDA devices of compute capability 9.0: what the kernel asks of its arguments, and its launch on torch's
// stream. The weight is not packed: the kernel reads it as it is.

#include "linear_op.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>
#include <utility>
#include <vector>

namespace vitfast {
namespace {

constexpr const char* op = "linear";

// In the words of kernels/linear.py.
void check(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, const Optional& layer_scale,
           const Optional& residual, const Optional& row_stats, const Optional& weight_sum) {
  using Named = std::pair<const char*, Optional>;  // not a reference: weight's is made here
  const Named like_x[] = {{"weight", weight}, {"bias", bias}, {"layer_scale", layer_scale}, {"residual", residual}};
  const Named in_fp32[] = {{"row_stats", row_stats}, {"weight_sum", weight_sum}};
  for (const auto& [name, tensor] : like_x) check_on_device(op, name, tensor, x);
  for (const auto& [name, tensor] : in_fp32) check_on_device(op, name, tensor, x);
  check_dtype(op, "x", x, {at::kHalf, at::kBFloat16});
  TORCH_CHECK_VALUE(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1) && x.size(-1) >= 1, op,
                    ": x [..., K] and weight [N, K] with K >= 1 do not fit: ", shape_text(x.sizes()), " and ",
                    shape_text(weight.sizes()));
  const int64_t n = weight.size(0), k = weight.size(1), m = rows_of(op, x);
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
  for (const auto& [name, tensor] : {like_x[1], like_x[2], in_fp32[0], in_fp32[1]}) check_pairs(op, name, tensor);
  check_sizes(op, x, weight, kLinearMultiple);
}

}  // namespace

bool linear_cuda_built() { return std::strstr(VITFAST_CUDA_STATE, "90a") != nullptr; }

std::vector<at::Tensor> linear_packed_cuda(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                                           const std::optional<std::string>& activation, const Optional& layer_scale,
                                           const Optional& residual, const Optional& row_stats,
                                           const Optional& weight_sum, double eps, bool stats) {
  check(x, weight, bias, layer_scale, residual, row_stats, weight_sum);
  const LinearActivation chosen = activation_of(op, activation, ", swiglu");  // in vitfast/ops/native.py
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard guard(x.device());
  const int processors = processors_of_sm_90a(op);

  const int64_t n = weight.size(0), k = weight.size(1), m = rows_of(op, x);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  std::vector<at::Tensor> result{at::empty(shape, x.options())};
  if (stats) {
    result.push_back(at::empty({m, (n + kLinearStats - 1) / kLinearStats, 2}, x.options().dtype(at::kFloat)));
  }
  if (m == 0 || n == 0) return result;

  LinearCall call{};
  call.x = read(op, "x", x), call.x_stride = row_stride(op, "x", x);
  call.weight = read(op, "weight", weight), call.weight_stride = row_stride(op, "weight", weight);
  call.residual = read(op, "residual", residual),
  call.residual_stride = residual ? row_stride(op, "residual", *residual) : 0;
  call.bias = read(op, "bias", bias), call.layer_scale = read(op, "layer_scale", layer_scale);
  call.row_stats = read<float>(op, "row_stats", row_stats);
  call.weight_sum = read<float>(op, "weight_sum", weight_sum);
  call.y = result[0].mutable_data_ptr(), call.y_stats = stats ? result[1].mutable_data_ptr<float>() : nullptr;
  call.m = static_cast<int>(m), call.n = static_cast<int>(n), call.k = static_cast<int>(k);
  call.activation = chosen, call.eps = static_cast<float>(eps);
  const LinearType type = x.scalar_type() == at::kHalf ? LinearType::fp16 : LinearType::bf16;
  const int error = linear_launch(type, call, processors, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
  return result;
}

}  // namespace vitfast
