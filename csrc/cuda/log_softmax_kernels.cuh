// log_softmax over the classes of each row, and its backward: grad - softmax * sum(grad).
//
// Either moves each operand and its result through memory once: of n elements 2 * n * sizeof(T)
// bytes forward and 3 * n * sizeof(T) backward, at one exponential and five operations to an
// element forward, three backward. At B bytes/s the bounds are 2 * n * sizeof(T) / B and 3 * n *
// sizeof(T) / B seconds. rows/kernels.cuh says where they hold (what is read twice must be found in
// a cache the second time), rows/plan.h why the launches should reach them.
#pragma once

#include "cuda/rows/operator.cuh"

namespace fastnn::cuda {

// What both directions say: no row is skipped, and there is nothing to report of one. Their first
// operand is reduced.
template <typename Storage, typename RowState, typename KnownOfRow>
struct LogSoftmaxRows {
  using T = Storage;
  using A = accum<T>;
  using State = RowState;
  using Row = KnownOfRow;
  static constexpr int kReduceInputs = 1;
  static constexpr bool kMaps = true, kSums = false;

  __device__ Row begin(int64_t) const {
    return {};
  }
  __device__ bool skips(const Row&) const {
    return false;
  }
  template <int N>
  __device__ void reduce(State& state, const Row&, Classes, const A (&x)[1][N]) const {
    state.add(x[0]);
  }
  __device__ void report(const Row&, int64_t, LossSums&) const {
  }
};

template <typename A>
struct LogSoftmaxRow {
  A max;
  A log_sum;
};

template <typename T, typename A = accum<T>>
struct LogSoftmax : LogSoftmaxRows<T, SoftmaxState<T>, LogSoftmaxRow<A>> {
  static constexpr int kMapInputs = 1;

  __device__ void finish(LogSoftmaxRow<A>& row, const SoftmaxState<T>& state, int64_t) const {
    row = {state.max, std::log(state.sum)};
  }
  // In two steps: the sum of the two would round the small differences of large logits away.
  template <int N>
  __device__ void map(const LogSoftmaxRow<A>& row, Classes, const A (&x)[1][N], A (&out)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = (x[0][j] - row.max) - row.log_sum;
  }
};

// Operands: grad, output. A row's sum is all that its threads know.
template <typename T, typename A = accum<T>>
struct LogSoftmaxBackward : LogSoftmaxRows<T, SumState<A>, SumState<A>> {
  static constexpr int kMapInputs = 2;

  __device__ void finish(SumState<A>& row, const SumState<A>& state, int64_t) const {
    row = state;
  }
  template <int N>
  __device__ void map(const SumState<A>& row, Classes, const A (&x)[2][N], A (&out)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = x[0][j] - std::exp(x[1][j]) * row.sum;
  }
};

}  // namespace fastnn::cuda
