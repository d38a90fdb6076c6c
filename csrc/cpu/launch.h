// Dispatch by dtype and the split of work, for all CPU launchers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <string_view>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/memory.h"
#include "ops/operands.h"

namespace fastnn::cpu {

// Calls f.template operator()<T>() with the kernels' storage type T of the dtype.
template <typename F>
void dispatch(at::ScalarType dtype, std::string_view op, F f) {
  dispatch_storage<simd::bfloat16, simd::float16>(dtype, op, f);
}

// Calls f.template operator()<T>() with PyTorch's storage type T of the dtype, which scalar code
// computes with.
template <typename F>
void dispatch_scalars(at::ScalarType dtype, std::string_view op, F f) {
  dispatch_storage<c10::BFloat16, c10::Half>(dtype, op, f);
}

// PyTorch's name for the kernels' storage type T.
template <typename T>
constexpr at::ScalarType kDtype = std::is_same_v<T, double>           ? at::kDouble
                                  : std::is_same_v<T, float>          ? at::kFloat
                                  : std::is_same_v<T, simd::bfloat16> ? at::kBFloat16
                                                                      : at::kHalf;

// Elements below which waking a second thread costs more than it gains.
constexpr int64_t kGrain = 1 << 14;

// The least number of items, of `elements` elements each, that a thread should take.
inline int64_t grain(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}

}  // namespace fastnn::cpu
