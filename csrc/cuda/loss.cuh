// Shared by the kernels of nll_loss and cross_entropy: class indices, incoming gradients, sums.
#pragma once

#include <c10/macros/Macros.h>

#include <limits>

#include "cuda/rows/reduce.cuh"
#include "cuda/rows/states.cuh"
#include "cuda/vec.cuh"

namespace fastnn::cuda {

// The class index t, or -1 where its row is ignored. Out of range, the assert (as torch's) ends the
// kernel, or the trap where asserts are off. Behind the trap no register is in use: the call, which
// the compiler expects to return, would make kernels spill some.
__device__ inline int64_t checked_class(int64_t t, int64_t classes, int64_t ignore_index) {
  if (t == ignore_index) return -1;
  const bool target_in_range = t >= 0 && t < classes;
  if (!target_in_range) {
    CUDA_KERNEL_ASSERT(target_in_range && "Target is out of bounds");
    __trap();
  }
  return t;
}

template <typename W>
__device__ accum<W> class_weight_at(const W* weight, int64_t c) {
  return weight ? to_accum(weight[c]) : accum<W>(1);
}

// The reciprocal of a total weight; NaN if that is 0.
template <typename A>
__device__ A reciprocal(A total) {
  return total == 0 ? std::numeric_limits<A>::quiet_NaN() : A(1) / total;
}

// A loss's incoming gradient: one value, or one per row. 'mean' has divided by the total weight
// (null otherwise).
template <typename T>
struct IncomingGrad {
  using A = accum<T>;

  const Wide<T>* grad;
  bool per_row;
  const A* total_weight;

  __device__ A undivided(int64_t row) const {
    return to_accum(grad[per_row ? row : 0]);
  }
  __device__ A of(int64_t row) const {
    return total_weight ? undivided(row) * reciprocal(*total_weight) : undivided(row);
  }
};

// The result of a loss over all rows; loss may be null. 'mean' over no weight is NaN, even if label
// smoothing's share of the loss did not vanish with the weights.
template <typename T>
struct LossResult {
  Wide<T>* loss;
  accum<T>* total_weight;
  bool mean;

  __device__ void set(const LossSums& sums) const {
    *total_weight = accum<T>(sums.weight);
    if (loss == nullptr) return;
    double value = sums.loss;
    if (mean) {
      value = sums.weight == 0 ? std::numeric_limits<double>::quiet_NaN() : value / sums.weight;
    }
    *loss = Wide<T>(accum<T>(value));
  }
};

// One block adds up the sums of the others, in a fixed order.
inline constexpr int kFinishThreads = 512;
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_loss_kernel(const LossSums* of_block, int64_t blocks, LossResult<T> result) {
  LossSums sums = LossSums::none();
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) sums.merge(of_block[i]);
  sums = reduce_block(sums);
  if (threadIdx.x == 0) result.set(sums);
}

}  // namespace fastnn::cuda
