// Integer arithmetic for kernels and launchers.
#pragma once

#include "cuda/portability.cuh"
#include "ops/integers.h"

namespace fastnn::cuda {

using fastnn::ceil_div;

template <typename I>
__host__ __device__ constexpr I min_of(I a, I b) {
  return a < b ? a : b;
}

}  // namespace fastnn::cuda
