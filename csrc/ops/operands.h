// Converts tensors to the raw pointers and layouts that kernels take, for the launchers of all
// devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "ops/layout.h"

namespace fastnn {

// Calls f.template operator()<T>() with the dtype's storage type T; bfloat16 and float16 have types
// of their own on each device.
template <typename BFloat16, typename Half, typename F>
void dispatch_storage(at::ScalarType dtype, std::string_view op, F f) {
  switch (dtype) {
    case at::kDouble:
      return f.template operator()<double>();
    case at::kFloat:
      return f.template operator()<float>();
    case at::kBFloat16:
      return f.template operator()<BFloat16>();
    case at::kHalf:
      return f.template operator()<Half>();
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, '"', op, "\" not implemented for '", dtype, "'");
  }
}

// A defined tensor's data; the caller has checked its dtype.
template <typename T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <typename T>
const T* const_data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* const_data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? const_data<T>(*tensor) : nullptr;
}

// A tensor as an operator's optional argument: nullopt if it is undefined.
inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

inline at::ScalarType accumulate_dtype(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(tensor->contiguous()) : std::nullopt;
}

// A contiguous tensor's layout, with its classes along dimension `dim`.
inline Layout layout_around(at::IntArrayRef sizes, int64_t dim) {
  Layout layout{1, sizes[dim], 1};
  for (const auto size : sizes.slice(0, dim)) layout.outer *= size;
  for (const auto size : sizes.slice(dim + 1)) layout.inner *= size;
  return layout;
}

// A loss's input with the dimensions after the classes merged into one; a copy if they have no
// common stride.
inline at::Tensor with_one_inner_stride(const at::Tensor& input) {
  if (input.dim() <= 2) return input;
  const Layout layout = layout_around(input.sizes(), 1);
  return input.reshape({layout.outer, layout.classes, layout.inner});
}

// The row strides of an input that with_one_inner_stride returned.
inline RowStrides row_strides(const at::Tensor& input) {
  if (input.dim() == 1) return {1, 0, input.stride(0), 0};
  if (input.dim() == 2) return {1, input.stride(0), input.stride(1), 0};
  return {input.size(2), input.stride(0), input.stride(1), input.stride(2)};
}

// Class indices as contiguous int64, one per row.
inline at::Tensor contiguous_indices(const at::Tensor& target) {
  // Each call costs as much as a small loss, even if it has nothing to do.
  const at::Tensor indices = target.scalar_type() == at::kLong ? target : target.to(at::kLong);
  return indices.is_contiguous() ? indices : indices.contiguous();
}

// Whether the classes of a loss's input are contiguous in memory although they are not the last
// dimension, as in channels_last; the kernels then read them in place.
inline bool has_classes_last(const at::Tensor& input) {
  return input.dim() > 2 && input.movedim(1, -1).is_contiguous();
}

// A tensor of the input's shape, laid out for the kernels.
inline at::Tensor arranged(const at::Tensor& tensor, bool classes_last) {
  return classes_last ? tensor.movedim(1, -1).contiguous() : tensor.contiguous();
}

}  // namespace fastnn
