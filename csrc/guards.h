// What stands between the ops and arguments that no memory holds: the arithmetic of sizes, and the way to a tensor's
// data. A tensor's shape proves nothing about its memory: an expanded one has more numbers than 64 bits count, one
// whose storage was resized has none.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

#include "checks.h"

namespace vitfast {

// A number of elements or bytes. What 64 bits do not hold, and a division by zero, is a ValueError.
class Size {
 public:
  Size(const char* op, int64_t value) : op_(op), value_(value) {}
  int64_t value() const { return value_; }

  friend Size operator+(const Size& a, int64_t b) {
    int64_t sum;
    TORCH_CHECK_VALUE(!__builtin_add_overflow(a.value_, b, &sum), a.op_, ": the sizes are too large: ", a.value_, " + ",
                      b, " is more than 64 bits hold");
    return Size(a.op_, sum);
  }
  friend Size operator*(const Size& a, int64_t b) {
    int64_t product;
    TORCH_CHECK_VALUE(!__builtin_mul_overflow(a.value_, b, &product), a.op_, ": the sizes are too large: ", a.value_,
                      " * ", b, " is more than 64 bits hold");
    return Size(a.op_, product);
  }
  friend Size operator/(const Size& a, int64_t b) {
    TORCH_CHECK_VALUE(b > 0, a.op_, ": a size of ", a.value_, " cannot be divided by ", b);
    return Size(a.op_, a.value_ / b);
  }
  friend Size operator%(const Size& a, int64_t b) { return Size(a.op_, a.value_ - (a / b).value_ * b); }
  friend Size operator+(const Size& a, const Size& b) { return a + b.value_; }
  friend Size operator*(const Size& a, const Size& b) { return a * b.value_; }

 private:
  const char* op_;
  int64_t value_;
};

inline Size round_up(const Size& size, int64_t step) { return (size + (step - 1)) / step * step; }

inline int64_t product(const char* op, at::IntArrayRef sizes) {
  Size all(op, 1);
  for (int64_t size : sizes) all = all * size;
  return all.value();
}

// The rows of x [..., C], which C = 0 does not hide.
inline int64_t rows_of(const char* op, const at::Tensor& x) { return product(op, x.sizes().slice(0, x.dim() - 1)); }

// Whether the tensor's storage holds all that its strides reach.
inline void check_storage(const char* op, const char* name, const at::Tensor& tensor) {
  if (tensor.numel() == 0) return;
  Size end = Size(op, tensor.storage_offset()) + 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (tensor.size(axis) > 1) end = end + Size(op, tensor.size(axis) - 1) * tensor.stride(axis);
  }
  const int64_t needed = (end * tensor.element_size()).value();
  const auto there = static_cast<int64_t>(tensor.storage().nbytes());
  TORCH_CHECK_VALUE(needed <= there && tensor.storage().data(), op, ": ", name, " of shape ",
                    shape_text(tensor.sizes()), " and strides ", shape_text(tensor.strides()), " needs a storage of ",
                    needed, " bytes, but its storage has ", there, "; was it resized?");
}

inline bool is_aligned(const at::Tensor& tensor, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// The data of an input: the only way to it.
inline const void* read(const char* op, const char* name, const at::Tensor& tensor) {
  check_storage(op, name, tensor);
  TORCH_CHECK_VALUE(is_aligned(tensor, tensor.element_size()), op, ": ", name, " is not aligned to the ",
                    tensor.element_size(), " bytes of its ", dtype_text(tensor.scalar_type()), "; clone() aligns it");
  return tensor.const_data_ptr();
}
template <typename scalar_t>
const scalar_t* read(const char* op, const char* name, const at::Tensor& tensor) {
  read(op, name, tensor);
  return tensor.const_data_ptr<scalar_t>();
}

// The same, null for a tensor that is not there.
inline const void* read(const char* op, const char* name, const std::optional<at::Tensor>& tensor) {
  return tensor ? read(op, name, *tensor) : nullptr;
}
template <typename scalar_t>
const scalar_t* read(const char* op, const char* name, const std::optional<at::Tensor>& tensor) {
  return tensor ? read<scalar_t>(op, name, *tensor) : nullptr;
}

// The tensor, copied unless it is contiguous and aligned, by default to its element's size.
inline at::Tensor contiguous(const char* op, const char* name, const at::Tensor& tensor, int64_t alignment = 0) {
  check_storage(op, name, tensor);
  const at::Tensor whole = tensor.contiguous();
  return is_aligned(whole, alignment ? alignment : whole.element_size()) ? whole : whole.clone();
}
inline std::optional<at::Tensor> contiguous(const char* op, const char* name, const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional<at::Tensor>(contiguous(op, name, *tensor)) : std::nullopt;
}

}  // namespace vitfast
