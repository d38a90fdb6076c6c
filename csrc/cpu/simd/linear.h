// linear and linear_relu: bias and ReLU over the GEMM's output, and their backward.
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

// The ReLU's backward, from the ReLU's output.
template <typename A>
inline vec<A> masked(vec<A> grad, vec<A> output) {
  return output <= 0 ? vec<A>{} : grad;
}

// Rows of fewer columns than this would leave many lanes of their vectors empty.
constexpr int64_t kNarrow = 64;

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

// Adds the sums over rows to `sums` unless that is null; value(i, n) gives the n values from index
// i on. Short blocks of rows are summed first, and the blocks in double: a column's error grows
// with the block, not with the number of rows.
template <typename A, typename F>
inline void sum_wide_rows(double* sums, int64_t rows, int64_t cols, int64_t stride, F value) {
  constexpr int64_t kBlock = 64, kGroup = 4;
  for (int64_t first = 0; first < rows; first += kBlock) {
    A block[kColumnSums] = {};
    const int64_t last = std::min(first + kBlock, rows);
    const auto sum_rows = [&]<int64_t N>(int64_t r, std::integral_constant<int64_t, N>) {
      for_each_vector<A>(0, cols, [&](int64_t c, int64_t n) {
        vec<A> values[N];
#pragma GCC unroll 4
        for (int64_t k = 0; k < N; ++k) values[k] = value((r + k) * stride + c, n);
        vec<A> sum = values[0];
        if constexpr (N == kGroup) sum = (sum + values[1]) + (values[2] + values[3]);
        store(block + c, load(block + c) + sum);
      });
    };
    int64_t r = first;
    for (; r + kGroup <= last; r += kGroup) sum_rows(r, std::integral_constant<int64_t, kGroup>());
    for (; r < last; ++r) sum_rows(r, std::integral_constant<int64_t, 1>());
    if (sums == nullptr) continue;
    for (int64_t c = 0; c < cols; ++c) sums[c] += block[c];
  }
}

// The same for contiguous rows of few columns: `cols` vectors hold as many rows as a vector has
// lanes, and the next ones have the same columns in the same lanes.
template <typename A, typename F>
inline void sum_narrow_rows(double* sums, int64_t rows, int64_t cols, F value) {
  constexpr int64_t kBlock = 64;
  const int64_t elements = rows * cols, group = cols * kLanes<A>;
  for (int64_t first = 0; first < elements; first += kBlock * group) {
    A block[kNarrow * kLanes<A>] = {};
    const int64_t last = std::min(first + kBlock * group, elements);
    for (int64_t g = first; g < last; g += group) {
      for_each_vector<A>(0, std::min(group, last - g), [&](int64_t i, int64_t n) {
        store(block + i, load(block + i) + value(g + i, n));
      });
    }
    if (sums == nullptr) continue;
    for (int64_t i = 0; i < group; i += cols) {
      for (int64_t c = 0; c < cols; ++c) sums[c] += block[i + c];
    }
  }
}

template <typename A, typename F>
inline void sum_rows(double* sums, int64_t rows, int64_t cols, int64_t stride, F value) {
  if (cols == stride && cols < kNarrow) {
    sum_narrow_rows<A>(sums, rows, cols, value);
  } else {
    sum_wide_rows<A>(sums, rows, cols, stride, value);
  }
}

template <typename T>
FASTNN_KERNEL void column_sums(double* sums, const T* grad, int64_t rows, int64_t cols,
                               int64_t stride) {
  sum_rows<accum<T>>(sums, rows, cols, stride,
                     [&](int64_t i, int64_t n) { return load_up_to(grad + i, n); });
}

template <typename T>
FASTNN_KERNEL void relu_backward(T* grad_linear, double* sums, const T* grad, const T* output,
                                 int64_t rows, int64_t cols, int64_t stride) {
  using A = accum<T>;
  sum_rows<A>(sums, rows, cols, stride, [&](int64_t i, int64_t n) {
    const vec<A> value = masked<A>(load_up_to(grad + i, n), load_up_to(output + i, n));
    store_up_to(grad_linear + i, n, value);
    return value;
  });
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
