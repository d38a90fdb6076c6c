// log_softmax over the classes of each row, and its backward: grad - softmax * sum(grad). Either
// moves each operand and its result through memory once.
#pragma once

#include "cuda/rows.cuh"

namespace fastnn::cuda {

template <typename Storage>
struct LogSoftmax {
  using T = Storage;
  using A = accum<T>;
  using State = SoftmaxState<A>;
  struct Row {
    A max;
    A log_sum;
  };
  static constexpr int kReduceInputs = 1, kMapInputs = 1;
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
  __device__ void finish(Row& row, const State& state, int64_t) const {
    row = {state.max, std::log(state.sum)};
  }
  __device__ void report(const Row&, int64_t, LossSums&) const {
  }
  // In two steps: the sum of the two would round the small differences of large logits away.
  template <int N>
  __device__ void map(const Row& row, Classes, const A (&x)[1][N], A (&out)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = (x[0][j] - row.max) - row.log_sum;
  }
};

// Operands: grad, output.
template <typename Storage>
struct LogSoftmaxBackward {
  using T = Storage;
  using A = accum<T>;
  using State = SumState<A>;
  struct Row {
    A sum;
  };
  static constexpr int kReduceInputs = 1, kMapInputs = 2;
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
  __device__ void finish(Row& row, const State& state, int64_t) const {
    row = {state.sum};
  }
  __device__ void report(const Row&, int64_t, LossSums&) const {
  }
  template <int N>
  __device__ void map(const Row& row, Classes, const A (&x)[2][N], A (&out)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = x[0][j] - std::exp(x[1][j]) * row.sum;
  }
};

}  // namespace fastnn::cuda
