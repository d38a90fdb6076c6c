// log_softmax over the classes of each row, and its backward: grad - softmax * sum(grad).
#pragma once

#include "cpu/simd/kernels.h"
#include "cpu/simd/rows.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

template <typename T, typename Out = T>
FASTNN_KERNEL void log_softmax(Out* output, const T* input, Layout layout, int64_t begin,
                               int64_t end) {
  using A = accum<T>;
  for_each_log_sum_exp(
      layout, begin, end, input, KeepNothing(),
      [&](auto rows, int64_t offset, int64_t, auto& x, auto&, const LogSumExp<A>& lse) {
        auto out = rows.writer(output + offset);
        rows.for_each_step([&](auto step) { out(step, lse.log_softmax(x(step, 0))); });
      });
}

template <typename T, typename Out = T>
FASTNN_KERNEL void log_softmax_backward(T* grad_input, const Out* grad, const Out* output,
                                        Layout layout, int64_t begin, int64_t end) {
  using A = accum<T>;
  const auto backward = [&](auto rows, int64_t offset, int64_t) {
    auto g = rows.reader(grad + offset);
    auto log_p = rows.reader(output + offset);
    auto grad_x = rows.writer(grad_input + offset);
    const vec<A> sum = rows.sum([&](auto step) { return g(step, 0); });
    rows.for_each_step([&](auto step) {
      const vec<A> softmax = exp<A>(log_p(step, 0));
      grad_x(step, g(step, 0) - softmax * sum);
    });
  };
  // With one reduction across lanes and no logarithm, a row by itself soon costs less than three
  // transpositions of it.
  for_each_row<A>(layout, begin, end, backward, /*short_row=*/kLanes<A>);
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
