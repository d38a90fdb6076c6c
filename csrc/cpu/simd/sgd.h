// SGD with momentum: weight decay, momentum and the step in one pass over memory.
#pragma once

#include "cpu/simd/kernels.h"
#include "cpu/simd/vec.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// A step's numbers in the accumulation type.
template <typename A>
struct SGDFormula {
  A lr;
  A momentum;
  A keep;
  A weight_decay;
  bool maximize;
  bool nesterov;
  bool is_first_step;

  explicit SGDFormula(const SGDOptions& options)
      : lr(A(options.lr)),
        momentum(A(options.momentum)),
        keep(A(1 - options.dampening)),
        weight_decay(A(options.weight_decay)),
        maximize(options.maximize),
        nesterov(options.nesterov),
        is_first_step(options.is_first_step) {
  }

  // Steps a vector of a parameter and its momentum buffer, which may be null; `load` and `store`
  // access a vector.
  template <typename T, typename B, typename Load, typename Store>
  void step(T* param, vec<A> grad, B* momentum_buffer, Load load, Store store) const {
    const vec<A> x = load(param);
    vec<A> d = maximize ? -grad : grad;
    if (weight_decay != 0) d += weight_decay * x;
    if (momentum_buffer) {
      const vec<A> b =
          is_first_step ? d : momentum * load(momentum_buffer) + rounded_product(keep, d);
      store(momentum_buffer, b);
      d = nesterov ? d + momentum * b : b;
    }
    store(param, x - lr * d);
  }
};

// `momentum_buffer` has type T or accum<T>.
template <typename T, typename B>
FASTNN_KERNEL void sgd_step(T* param, T* grad, B* momentum_buffer, int64_t n,
                            const SGDOptions& options, double grad_scale) {
  using A = accum<T>;
  const SGDFormula<A> formula(options);
  const auto step = [&](auto load, auto store, int64_t i) {
    vec<A> g = load(grad + i);
    if (grad_scale != 1) {
      g /= A(grad_scale);
      store(grad + i, g);
    }
    formula.step(param + i, g, momentum_buffer ? momentum_buffer + i : nullptr, load, store);
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
