// Arithmetic with sizes, in kernels and launchers.
#pragma once

#include "cuda/portability.cuh"

namespace fastnn::cuda {

template <typename I>
__host__ __device__ constexpr I ceil_div(I n, I divisor) {
  return (n + divisor - 1) / divisor;
}

template <typename I>
__host__ __device__ constexpr I min_of(I a, I b) {
  return a < b ? a : b;
}

}  // namespace fastnn::cuda
