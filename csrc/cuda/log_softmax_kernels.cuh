// log_softmax over the classes of each row, and its backward: grad - softmax * sum(grad).
// What bounds them: docs/performance.md, "Bounds of the CUDA kernels".
#pragma once

#include "cuda/rows/operator.cuh"

namespace fastnn::cuda {

template <typename Storage>
struct LogSoftmaxRows : RowDefaults {
  using T = Storage;
  using Out = Wide<T>;
  using A = accum<T>;
  using State = SoftmaxState<T>;
  struct Row {
    A max;
    A log_sum;
  };
  static constexpr int kReduceInputs = 1, kMapInputs = 1;

  __device__ void finish(Row& row, const State& state, int64_t) const {
    row = {state.max, std::log(state.sum)};
  }
  // In two steps: the sum of the two would round away the small differences of large logits.
  template <int N>
  __device__ void map(const Row& row, Classes, const A (&x)[1][N], A (&out)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = (x[0][j] - row.max) - row.log_sum;
  }
};

// Operands: grad, output. A row's threads share only its sum.
template <typename Storage>
struct LogSoftmaxBackwardRows : RowDefaults {
  using T = Wide<Storage>;
  using Out = Storage;
  using A = accum<T>;
  using State = SumState<A>;
  using Row = State;
  static constexpr int kReduceInputs = 1, kMapInputs = 2;

  __device__ void finish(Row& row, const State& state, int64_t) const {
    row = state;
  }
  template <int N>
  __device__ void map(const Row& row, Classes, const A (&x)[2][N], A (&out)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = x[0][j] - exp_for<T>(x[1][j]) * row.sum;
  }
};

}  // namespace fastnn::cuda
