// nll_loss, and its backward.
// What bounds them: docs/performance.md, "Bounds of the CUDA kernels".
#pragma once

#include "cuda/loss.cuh"
#include "cuda/rows/operator.cuh"
#include "ops/layout.h"

namespace fastnn::cuda {

// `weight` and `losses` may be null.
template <typename T>
struct NLLLossArgs {
  const T* log_probs;
  RowStrides strides;
  const int64_t* target;
  int64_t rows;
  int64_t classes;
  int64_t ignore_index;
  const Wide<T>* weight;
  Wide<T>* losses;
  LossResult<T> result;
};

inline constexpr int kNLLThreads = 256;
// Rows of a thread whose cache misses overlap.
inline constexpr int kNLLUnroll = 4;

template <typename T>
__global__ void __launch_bounds__(kNLLThreads)
    nll_loss_kernel(NLLLossArgs<T> args, LossSums* sums_of_block) {
  using A = accum<T>;
  LossSums sums = LossSums::none();
  constexpr int64_t kRowsAtOnce = kNLLThreads * kNLLUnroll;
  for (int64_t base = blockIdx.x * kRowsAtOnce; base < args.rows; base += gridDim.x * kRowsAtOnce) {
    int64_t t[kNLLUnroll];
    A log_p[kNLLUnroll];
#pragma unroll
    for (int u = 0; u < kNLLUnroll; ++u) {
      const int64_t row = base + u * kNLLThreads + threadIdx.x;
      t[u] =
          row < args.rows ? checked_class(args.target[row], args.classes, args.ignore_index) : -1;
    }
#pragma unroll
    for (int u = 0; u < kNLLUnroll; ++u) {
      const int64_t row = base + u * kNLLThreads + threadIdx.x;
      log_p[u] = t[u] < 0 ? A(0) : to_accum(args.log_probs[args.strides.element(row, t[u])]);
    }
#pragma unroll
    for (int u = 0; u < kNLLUnroll; ++u) {
      const int64_t row = base + u * kNLLThreads + threadIdx.x;
      const A weight = t[u] < 0 ? A(0) : class_weight_at(args.weight, t[u]);
      const A loss = t[u] < 0 ? A(0) : -weight * log_p[u];
      if (args.losses && row < args.rows) args.losses[row] = Wide<T>(loss);
      sums.loss += loss;
      sums.weight += weight;
    }
  }
  sums = reduce_block(sums);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    args.result.set(sums);
  } else {
    sums_of_block[blockIdx.x] = sums;
  }
}

// Reads no operand. The rows' kernels write the zeros too, which a memset and a scatter would move
// twice if rows are short.
template <typename Storage>
struct NLLLossBackwardRows : RowDefaults {
  using T = Storage;
  using A = accum<T>;
  struct Row {
    int64_t target;
    A at_target;
  };

  const int64_t* target;
  int64_t classes;
  int64_t ignore_index;
  const Wide<T>* weight;
  IncomingGrad<T> grad;

  __device__ void begin(Row& row, int64_t position) const {
    const int64_t t = checked_class(target[position], classes, ignore_index);
    row = {t, t < 0 ? A(0) : -class_weight_at(weight, t) * grad.of(position)};
  }
  template <int N>
  __device__ void map(const Row& row, Classes classes, const A (&)[1][N], A (&out)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = classes.at(j) == row.target ? row.at_target : A(0);
  }
};

}  // namespace fastnn::cuda
