// What the CPU launchers share: from tensors to raw pointers and layouts, and the split of work.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <string_view>

#include "cpu/capability.h"
#include "cpu/memory.h"

namespace fastnn::cpu {

// Calls f.template operator()<T>() with the kernels' storage type T of the dtype.
template <typename F>
void dispatch(at::ScalarType dtype, std::string_view op, F f) {
  switch (dtype) {
    case at::kDouble:
      return f.template operator()<double>();
    case at::kFloat:
      return f.template operator()<float>();
    case at::kBFloat16:
      return f.template operator()<simd::bfloat16>();
    case at::kHalf:
      return f.template operator()<simd::float16>();
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

inline at::ScalarType accumulate_dtype(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(tensor->contiguous()) : std::nullopt;
}

// Elements below which waking a second thread costs more than it gains.
constexpr int64_t kGrain = 1 << 14;

// How many items of `elements` elements each a thread should take at least.
inline int64_t grain(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}

// A contiguous tensor's layout around its dimension `dim` of classes.
inline simd::Layout layout_around(at::IntArrayRef sizes, int64_t dim) {
  simd::Layout layout{1, sizes[dim], 1};
  for (const auto size : sizes.slice(0, dim)) layout.outer *= size;
  for (const auto size : sizes.slice(dim + 1)) layout.inner *= size;
  return layout;
}

}  // namespace fastnn::cpu
