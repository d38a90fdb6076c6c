// Matrix products on the CPU: our tiled kernel or the library's, whichever is faster.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastnn::cpu {

// a @ b (+ bias) (then ReLU), of 2-D matrices of any strides, and a bias (cols).
at::Tensor matmul(const at::Tensor& a, const at::Tensor& b,
                  const std::optional<at::Tensor>& bias = std::nullopt, bool relu = false);

}  // namespace fastnn::cpu
