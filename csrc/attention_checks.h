// Argument checks of attention, on every device; in the words of vitfast/ops/checks.py.
#pragma once

#include <utility>

#include "checks.h"
#include "guards.h"

namespace vitfast {

constexpr int64_t kMaxHeadDim = 256;

inline void check_broadcast(const char* name, const std::optional<at::Tensor>& tensor, at::IntArrayRef shape) {
  if (!tensor) return;
  bool fits = tensor->dim() <= 4;
  for (int64_t i = 1; fits && i <= tensor->dim(); ++i) {
    fits = tensor->size(-i) == 1 || tensor->size(-i) == shape[4 - i];
  }
  TORCH_CHECK_VALUE(fits, "attention: ", name, " of shape ", shape_text(tensor->sizes()), " cannot be broadcast to ",
                    shape_text(shape));
}

// Shapes, dtypes and strides, whatever the device. `dtypes`: those of q that it has kernels for.
inline void check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mask,
                            std::initializer_list<at::ScalarType> dtypes) {
  const char* op = "attention";
  check_dtype(op, "q", q, dtypes);
  check_dtype(op, "k", k, {q.scalar_type()});
  check_dtype(op, "v", v, {q.scalar_type()});
  const std::pair<const char*, const at::Tensor&> inputs[] = {{"q", q}, {"k", k}, {"v", v}};
  for (const auto& [name, tensor] : inputs) {
    TORCH_CHECK_VALUE(tensor.dim() == 4, op, ": ", name, " must be [B, N, H, D], got shape ",
                      shape_text(tensor.sizes()));
    TORCH_CHECK_VALUE(tensor.size(3) <= 1 || tensor.stride(3) == 1, op, ": the last axis of ", name, " has stride ",
                      tensor.stride(3), ", expected 1");
  }
  check_shape(op, "k", k, {q.size(0), k.size(1), q.size(2), q.size(3)});
  check_shape(op, "v", v, k.sizes());
  TORCH_CHECK_VALUE(q.size(3) >= 1 && q.size(3) <= kMaxHeadDim, op, ": head dim must be 1..", kMaxHeadDim, ", got ",
                    q.size(3));
  if (mask) check_dtype(op, "mask", *mask, {at::kBool});
  if (bias) check_dtype(op, "bias", *bias, {at::kFloat, at::kHalf, at::kBFloat16});
  const int64_t scores[] = {q.size(0), q.size(2), q.size(1), k.size(1)};
  if (bias || mask) product(op, scores);  // what they are expanded to
  check_broadcast("bias", bias, scores);
  check_broadcast("mask", mask, scores);
}

}  // namespace vitfast
