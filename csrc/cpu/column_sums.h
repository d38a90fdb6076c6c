// Sums over the rows of a contiguous matrix: a bias's gradient. T: a storage type of the kernels.
#pragma once

#include <cstdint>

namespace fastnn::cpu {

// sums[c] = the sum of column c.
template <typename T>
void column_sums(T* sums, const T* grad, int64_t rows, int64_t cols);

// grad_linear = output > 0 ? grad : 0, and its column_sums unless `sums` is null. grad_linear may
// alias grad.
template <typename T>
void relu_backward(T* grad_linear, T* sums, const T* grad, const T* output, int64_t rows,
                   int64_t cols);

}  // namespace fastnn::cpu
