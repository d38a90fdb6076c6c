// A thread's state of the part of a row that it has read, and how states are merged.
// A state has none(), merge(other) and each(f), the state of f(member) for every member.
#pragma once

#include <cmath>
#include <limits>

#include "cuda/portability.cuh"
#include "cuda/vec.cuh"
#include "ops/accum.h"

namespace fastnn::cuda {

template <typename A>
__device__ constexpr A lowest() {
  return -std::numeric_limits<A>::infinity();
}

struct NoState {
  __device__ static NoState none() {
    return {};
  }
  __device__ void merge(const NoState&) {
  }
  template <typename F>
  __device__ NoState each(F) const {
    return {};
  }
};

template <typename A>
struct SumState {
  A sum;

  __device__ static SumState none() {
    return {A(0)};
  }
  template <int N>
  __device__ void add(const A (&values)[N]) {
    // Summed separately first: shorter chains of additions, with fewer roundings in each.
    A part = values[0];
#pragma unroll
    for (int j = 1; j < N; ++j) part += values[j];
    sum += part;
  }
  __device__ void merge(const SumState& other) {
    sum += other.sum;
  }
  template <typename F>
  __device__ SumState each(F f) const {
    return {f(sum)};
  }
};

// exp(x - y), as a term of a sum or a factor of a value that is rounded to T. Two bytes need only
// the leading digits of float32, and subnormal results may be 0: two instructions instead of seven,
// which would slow down the passes over such rows (H200).
template <typename T>
__device__ accum<T> exp_for(accum<T> x, accum<T> y = 0) {
  constexpr float kLog2E = 1.44269504f;
  if constexpr (sizeof(Wide<T>) == 2) {
    return FASTNN_EXP2(x * kLog2E - y * kLog2E);
  } else {
    return std::exp(x - y);
  }
}

// Rounded, never fused with an addition: the sum of two such products is the same in either order,
// so lanes that merge their states both ways get the same bits.
__device__ inline float rounded_product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ inline double rounded_product(double a, double b) {
  return __dmul_rn(a, b);
}

// The maximum so far and the sum of exp(x - max), in one pass ("online softmax"), over elements of
// T. A NaN goes to the sum, as does the NaN of inf - inf.
template <typename T>
struct SoftmaxState {
  using A = accum<T>;
  A max;
  A sum;

  __device__ static SoftmaxState none() {
    return {lowest<A>(), A(0)};
  }
  // The value that x is relative to: -inf - -inf would be NaN where other classes are finite.
  __device__ A origin() const {
    return max == lowest<A>() ? A(0) : max;
  }
  template <int N>
  __device__ void add(const A (&x)[N]) {
    raise_max(highest(x));
    sum += sum_of_exp(x);
  }
  __device__ void merge(const SoftmaxState& other) {
    const A m = std::fmax(max, other.max);
    sum = rounded_product(sum, factor(max, m)) + rounded_product(other.sum, factor(other.max, m));
    max = m;
  }
  template <typename F>
  __device__ SoftmaxState each(F f) const {
    return {f(max), f(sum)};
  }

  template <int N>
  __device__ A highest(const A (&x)[N]) const {
    A m = max;
#pragma unroll
    for (int j = 0; j < N; ++j) m = std::fmax(m, x[j]);
    return m;
  }
  // This is rare after the first few classes, so a branch is cheaper than an exponential each time.
  __device__ void raise_max(A m) {
    if (m > max) [[unlikely]] {
      sum *= std::exp(max - m);
      max = m;
    }
  }
  template <int N>
  __device__ A sum_of_exp(const A (&x)[N]) const {
    const A from = origin();
    A part = exp_for<T>(x[0] - from);
#pragma unroll
    for (int j = 1; j < N; ++j) part += exp_for<T>(x[j] - from);
    return part;
  }
  // The factor that makes a sum relative to `old` one relative to m.
  __device__ static A factor(A old, A m) {
    return old == m ? A(1) : std::exp(old - m);
  }
};

// Also the sums of q and of q * (x - max), for a loss over all classes: sum_c q_c * (lse - x_c) is
// log(sum) * sum(q) minus the latter. It is relative to the maximum as large logits would cancel.
template <typename T>
struct SpreadState {
  using A = accum<T>;
  SoftmaxState<T> softmax;
  A q;
  A q_x;

  __device__ static SpreadState none() {
    return {SoftmaxState<T>::none(), A(0), A(0)};
  }
  template <int N>
  __device__ void add(const A (&x)[N], const A (&q_at)[N]) {
    const A m = softmax.highest(x);
    q_x -= q_times_rise(m);
    softmax.raise_max(m);
    softmax.sum += softmax.sum_of_exp(x);
    const A from = softmax.origin();
    A q_part = q_at[0], q_x_part = q_at[0] * (x[0] - from);
#pragma unroll
    for (int j = 1; j < N; ++j) {
      q_part += q_at[j];
      q_x_part = std::fma(q_at[j], x[j] - from, q_x_part);
    }
    q += q_part;
    q_x += q_x_part;
  }
  __device__ void merge(const SpreadState& other) {
    const A m = std::fmax(softmax.max, other.softmax.max);
    q_x = (q_x - q_times_rise(m)) + (other.q_x - other.q_times_rise(m));
    q += other.q;
    softmax.merge(other.softmax);
  }
  template <typename F>
  __device__ SpreadState each(F f) const {
    return {softmax.each(f), f(q), f(q_x)};
  }

 private:
  // What q_x loses when the maximum becomes m. If all classes were -inf, they were taken relative
  // to 0, and stay -inf.
  __device__ A q_times_rise(A m) const {
    const A old = softmax.max;
    return old == m || old == lowest<A>() ? A(0) : q * (m - old);
  }
};

// In double for every storage type: a loss over many rows stays precise, for two additions per row.
struct LossSums {
  double loss;
  double weight;

  __device__ static LossSums none() {
    return {0, 0};
  }
  __device__ void merge(const LossSums& other) {
    loss += other.loss;
    weight += other.weight;
  }
  template <typename F>
  __device__ LossSums each(F f) const {
    return {f(loss), f(weight)};
  }
};

}  // namespace fastnn::cuda
