// A step of SGD along a gradient in memory.
#pragma once

#include "cpu/capability.h"

namespace fastnn::cpu {

// Steps the elements [begin, end) of a parameter along its gradient.
template <typename T>
void step_range(const simd::SteppedParam<T>& of, T* grad, int64_t begin, int64_t end,
                double grad_scale = 1) {
  const auto step = [&](auto kernel, auto* buffer) {
    kernel(of.param + begin, grad + begin, buffer ? buffer + begin : nullptr, end - begin,
           of.options, grad_scale);
  };
  of.wide_momentum_buffer ? step(kernels<T>().sgd_step_wide, of.wide_momentum_buffer)
                          : step(kernels<T>().sgd_step, of.momentum_buffer);
}

}  // namespace fastnn::cpu
