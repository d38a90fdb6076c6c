// linear_relu: bias and ReLU over the GEMM's output, and their backward.
#pragma once

#include <algorithm>

#include "cpu/simd/kernels.h"
#include "cpu/simd/vec.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// Zero where x <= 0, so that NaN passes through as in torch.relu.
template <typename A>
inline vec<A> relu(vec<A> x) {
  return x <= 0 ? vec<A>{} : x;
}

// Calls f(c, n) for vectors of n columns from column c on, over [begin, end).
template <typename A, typename F>
inline void for_each_vector(int64_t begin, int64_t end, F f) {
  for (int64_t c = begin; c < end; c += kLanes<A>) f(c, std::min(kLanes<A>, end - c));
}

template <typename T>
FASTNN_KERNEL void bias_relu(T* out, const T* bias, int64_t cols, int64_t begin, int64_t end) {
  using A = accum<T>;
  for (int64_t r = begin; r < end; ++r) {
    T* row = out + r * cols;
    for_each_vector<A>(0, cols, [&](int64_t c, int64_t n) {
      const vec<A> linear = load_up_to(row + c, n);
      store_up_to(row + c, n, relu<A>(bias ? linear + load_up_to(bias + c, n) : linear));
    });
  }
}

// The columns [begin, end) of at most kStrip: few enough for their sums to stay in registers or
// the nearest cache, enough to use whole cache lines of every row.
constexpr int64_t kStrip = 64;

template <typename T>
FASTNN_KERNEL void relu_backward_strip(T* grad_linear, T* grad_bias, const T* grad, const T* output,
                                       int64_t rows, int64_t cols, int64_t begin, int64_t end) {
  using A = accum<T>;
  // A column's sum in short blocks of rows, and theirs in double: its error grows with the block,
  // not with the number of rows.
  constexpr int64_t kBlock = 16;
  double total[kStrip] = {};
  for (int64_t first = 0; first < rows; first += kBlock) {
    A block[kStrip] = {};
    for (int64_t r = first; r < std::min(first + kBlock, rows); ++r) {
      for_each_vector<A>(begin, end, [&](int64_t c, int64_t n) {
        const int64_t i = r * cols + c;
        const vec<A> masked = load_up_to(output + i, n) <= 0 ? vec<A>{} : load_up_to(grad + i, n);
        store_up_to(grad_linear + i, n, masked);
        A* sum = block + (c - begin);
        store(sum, load(sum) + masked);
      });
    }
    for (int64_t c = 0; c < kStrip; ++c) total[c] += block[c];
  }
  if (grad_bias == nullptr) return;
  for (int64_t c = begin; c < end; ++c) store_scalar(grad_bias + c, A(total[c - begin]));
}

template <typename T>
void relu_backward(T* grad_linear, T* grad_bias, const T* grad, const T* output, int64_t rows,
                   int64_t cols, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += kStrip) {
    relu_backward_strip(grad_linear, grad_bias, grad, output, rows, cols, c,
                        std::min(c + kStrip, end));
  }
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
