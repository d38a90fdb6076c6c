// log_softmax over the classes of each row, and its backward: grad - softmax * sum(grad).
#pragma once

#include "cpu/simd/kernels.h"
#include "cpu/simd/rows.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

template <typename T>
FASTNN_KERNEL void log_softmax(T* output, const T* input, Layout layout, int64_t begin,
                               int64_t end) {
  using A = accum<T>;
  for_each_row<A>(layout, begin, end, [&](auto rows, int64_t offset, int64_t) {
    const T* x = input + offset;
    const LogSumExp<A> lse = log_sum_exp(rows, x);
    rows.for_each_step([&](auto step) {
      rows.store(output + offset, step, lse.log_softmax(rows.load(x, step, 0)));
    });
  });
}

template <typename T>
FASTNN_KERNEL void log_softmax_backward(T* grad_input, const T* grad, const T* output,
                                        Layout layout, int64_t begin, int64_t end) {
  using A = accum<T>;
  for_each_row<A>(layout, begin, end, [&](auto rows, int64_t offset, int64_t) {
    vec<A> sum = {};
    rows.for_each_step([&](auto step) { sum += rows.load(grad + offset, step, 0); });
    sum = rows.reduce_sum(sum);
    rows.for_each_step([&](auto step) {
      const vec<A> softmax = exp<A>(rows.load(output + offset, step, 0));
      rows.store(grad_input + offset, step, rows.load(grad + offset, step, 0) - softmax * sum);
    });
  });
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
