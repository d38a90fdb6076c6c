// What the kernels of nll_loss and cross_entropy share: class indices, incoming gradients, sums.
#pragma once

#include <c10/macros/Macros.h>

#include <limits>

#include "cuda/rows/reduce.cuh"
#include "cuda/rows/states.cuh"
#include "cuda/vec.cuh"

namespace fastnn::cuda {

// The class index of a row, or -1 where the row doesn't count: ignored, or out of range. The assert
// reports the latter (as torch's); nothing is read or written at it even where asserts are off.
__device__ inline int64_t class_of_row(const int64_t* target, int64_t row, int64_t classes,
                                       int64_t ignore_index) {
  const int64_t t = target[row];
  if (t == ignore_index) return -1;
  const bool target_in_range = t >= 0 && t < classes;
  CUDA_KERNEL_ASSERT(target_in_range && "Target is out of bounds");
  return target_in_range ? t : -1;
}

template <typename T>
__device__ accum<T> class_weight_at(const T* weight, int64_t c) {
  return weight ? to_accum(weight[c]) : accum<T>(1);
}

// The reciprocal of a total weight; NaN where that is 0.
template <typename A>
__device__ A reciprocal(A total) {
  return total == 0 ? std::numeric_limits<A>::quiet_NaN() : A(1) / total;
}

// A loss's incoming gradient: one value, or one for each row. 'mean' has divided by the total
// weight (null otherwise).
template <typename T>
struct IncomingGrad {
  const T* grad;
  bool per_row;
  const accum<T>* total_weight;

  __device__ accum<T> of(int64_t row) const {
    using A = accum<T>;
    const A g = to_accum(grad[per_row ? row : 0]);
    return total_weight ? g * reciprocal(*total_weight) : g;
  }
};

// One block adds up what the others have left, in a fixed order; loss may be null. Over no weight
// 'mean' is NaN, also where label smoothing's share of the loss did not vanish with the weights.
inline constexpr int kFinishThreads = 512;
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_loss_kernel(const LossSums* of_block, int64_t blocks, bool mean, T* loss,
                       accum<T>* total_weight) {
  LossSums sums = LossSums::none();
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) sums.merge(of_block[i]);
  sums = reduce_block(sums);
  if (threadIdx.x != 0) return;
  *total_weight = accum<T>(sums.weight);
  if (loss == nullptr) return;
  double result = sums.loss;
  if (mean) {
    result = sums.weight == 0 ? std::numeric_limits<double>::quiet_NaN() : result / sums.weight;
  }
  *loss = T(accum<T>(result));
}

}  // namespace fastnn::cuda
