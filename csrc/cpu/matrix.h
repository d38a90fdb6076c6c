// Tensors as the kernels' matrices.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/simd/kernels.h"
#include "ops/operands.h"

namespace fastnn::cpu {

// A 2-D tensor itself if one of its strides is 1, else a copy.
inline at::Tensor as_matrix(const at::Tensor& tensor) {
  const auto lies_well = [](int64_t outer_size, int64_t outer, int64_t inner_size, int64_t inner) {
    return inner == 1 && (outer >= inner_size || outer_size <= 1);
  };
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return lies_well(sizes[0], strides[0], sizes[1], strides[1]) ||
                 lies_well(sizes[1], strides[1], sizes[0], strides[0])
             ? tensor
             : tensor.contiguous();
}

// The memory of as_matrix()'s result.
template <typename T>
simd::Matrix<T> operand(const at::Tensor& matrix) {
  const bool transposed = matrix.stride(1) != 1;
  return {const_data<T>(matrix), matrix.stride(transposed ? 1 : 0), transposed};
}

template <typename T>
simd::Matrix<T> transposed(simd::Matrix<T> matrix) {
  matrix.transposed = !matrix.transposed;
  return matrix;
}

}  // namespace fastnn::cpu
