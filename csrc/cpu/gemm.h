// Matrix products on the CPU: our tiled kernel or the library's, whichever is faster.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/simd/kernels.h"

namespace fastnn::cpu {

// a @ b (+ bias) (then ReLU), of 2-D matrices of any strides, and a bias (cols).
at::Tensor matmul(const at::Tensor& a, const at::Tensor& b,
                  const std::optional<at::Tensor>& bias = std::nullopt, bool relu = false);

// The same on raw memory, with any epilogue. T: a storage type of the kernels.
template <typename T>
void multiply(const simd::Gemm<T>& args);

// out = a @ b + bias, or out + a @ b with `add` and no bias. `out` is contiguous, and everything
// but b has b's accumulation dtype.
void matmul_into(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                 const std::optional<at::Tensor>& bias, bool add);

}  // namespace fastnn::cpu
