// Argument checks shared by the ops; errors read like those of vitfast/ops/checks.py and reach Python
// as ValueError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace vitfast {

inline std::string dtype_text(at::ScalarType dtype) {
  return std::string("torch.").append(c10::getDtypeNames(dtype).first);
}

// As Python prints a tuple: (2, 3), (2,), ().
inline std::string shape_text(at::IntArrayRef shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& tensor,
                        std::initializer_list<at::ScalarType> allowed) {
  std::string names;
  for (at::ScalarType dtype : allowed) {
    if (tensor.scalar_type() == dtype) return;
    names += (names.empty() ? "" : ", ") + dtype_text(dtype);
  }
  TORCH_CHECK_VALUE(false, op, ": ", name, " has dtype ", dtype_text(tensor.scalar_type()), ", allowed: ", names);
}

inline void check_shape(const char* op, const char* name, const std::optional<at::Tensor>& tensor,
                        at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(!tensor || tensor->sizes() == shape, op, ": ", name, " has shape ", shape_text(tensor->sizes()),
                    ", expected ", shape_text(shape));
}

}  // namespace vitfast
