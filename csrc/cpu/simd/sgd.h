// SGD with momentum: weight decay, momentum and the step in one pass over memory.
#pragma once

#include "cpu/simd/kernels.h"
#include "cpu/simd/vec.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// `momentum_buffer` is of T or of what it is computed in.
template <typename T, typename B>
FASTNN_KERNEL void sgd_step(T* param, T* grad, B* momentum_buffer, int64_t n,
                            const SGDOptions& options, double grad_scale) {
  using A = accum<T>;
  const A lr = A(options.lr);
  const A momentum = A(options.momentum);
  const A keep = A(1 - options.dampening);
  const A weight_decay = A(options.weight_decay);
  const A sign = options.maximize ? A(-1) : A(1);

  const auto step = [&](auto load, auto store, int64_t i) {
    const vec<A> x = load(param + i);
    vec<A> g = load(grad + i);
    if (grad_scale != 1) {
      g /= A(grad_scale);
      store(grad + i, g);
    }
    vec<A> d = sign * g;
    if (weight_decay != 0) d += weight_decay * x;
    if (momentum_buffer) {
      const vec<A> b = options.is_first_step ? d : momentum * load(momentum_buffer + i) + keep * d;
      store(momentum_buffer + i, b);
      d = options.nesterov ? d + momentum * b : b;
    }
    store(param + i, x - lr * d);
  };

  const auto load_whole = [](const auto* from) { return load(from); };
  const auto store_whole = [](auto* to, vec<A> value) { store(to, value); };
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) step(load_whole, store_whole, i);
  if (i < n) {
    const auto load_rest = [&](const auto* from) { return load_up_to(from, n - i); };
    const auto store_rest = [&](auto* to, vec<A> value) { store_up_to(to, n - i, value); };
    step(load_rest, store_rest, i);
  }
}

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
