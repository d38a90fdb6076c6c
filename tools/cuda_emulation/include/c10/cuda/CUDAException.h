// Stands in for c10's header of this name.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>

#define C10_CUDA_CHECK(expression)                                                              \
  do {                                                                                          \
    const cudaError_t fastnn_error = (expression);                                              \
    if (fastnn_error != cudaSuccess) {                                                          \
      throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(fastnn_error) + \
                               " in " #expression);                                             \
    }                                                                                           \
  } while (false)

#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
