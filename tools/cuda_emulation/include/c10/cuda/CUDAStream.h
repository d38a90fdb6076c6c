// Stands in for c10's header of this name: the one stream of the emulation.
#pragma once

#include <cuda_runtime.h>

namespace c10::cuda {

class CUDAStream {
 public:
  cudaStream_t stream() const {
    return nullptr;
  }
  operator cudaStream_t() const {
    return stream();
  }
};

inline CUDAStream getCurrentCUDAStream(int /*device*/ = -1) {
  return {};
}

}  // namespace c10::cuda
