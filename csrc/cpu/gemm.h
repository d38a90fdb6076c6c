// Matrix products on the CPU: our tiled kernel or the library's, whichever is faster.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastnn::cpu {

// relu(a @ b + bias), of 2-D matrices of any strides; `bias` (cols) may be absent.
at::Tensor matmul_bias_relu(const at::Tensor& a, const at::Tensor& b,
                            const std::optional<at::Tensor>& bias);

// a @ b.
at::Tensor matmul(const at::Tensor& a, const at::Tensor& b);

}  // namespace fastnn::cpu
