// Any optimizer's step of many tensors in one launch, in which each tensor has blocks for all its
// elements: which tensor a block steps, and the launches.
#pragma once

#include "cuda/integers.cuh"
#include "cuda/vec.cuh"

namespace fastnn::cuda {

// The bytes of a kernel's arguments: as many as any driver takes, and as those since CUDA 12.1
// take.
constexpr int kArgumentBytes = 4096;
constexpr int kManyArgumentBytes = CUDART_VERSION < 12010 ? kArgumentBytes : 32764;
constexpr int kOtherArgumentBytes = 128;  // those that aren't the tensors'

// A number in device memory, so that nothing waits for it.
struct DeviceScalar {
  const void* data = nullptr;
  bool is_double = false;  // or else float

  __device__ double value_or(double otherwise) const {
    if (data == nullptr) return otherwise;
    return is_double ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
  }
};

// The tensors of a launch; `Pointers` are those of one parameter's tensors.
template <typename Pointers, int kBytes>
struct TensorBatch {
  static constexpr int kCapacity =
      (kBytes - kOtherArgumentBytes) / int(sizeof(unsigned) + sizeof(int64_t) + sizeof(Pointers));
  int count = 0;
  unsigned first_block[kCapacity + 1] = {};
  int64_t sizes[kCapacity];
  Pointers pointers[kCapacity];
};

// The last tensor whose first block is not past `block`.
template <typename Pointers, int kBytes>
__device__ int tensor_of_block(const TensorBatch<Pointers, kBytes>& tensors, unsigned block) {
  int low = 0, high = tensors.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tensors.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// ---- the launches, on the host ----

// Collects tensors and calls launch(blocks, tensors) whenever a launch is full. A block steps
// `chunk` elements, in vectors of `vec` that are aligned, wherever the tensor starts.
template <typename Pointers, int kBytes, typename Launch>
class BatchLauncher {
 public:
  BatchLauncher(int64_t chunk, int64_t vec, Launch launch)
      : chunk_(chunk), vec_(vec), launch_(launch) {
  }

  void add(const Pointers& pointers, int64_t n) {
    if (n == 0) return;
    // Enough for the worst alignment of the tensor's start.
    const int64_t blocks = ceil_div(n + vec_ - 1, chunk_);
    const int64_t first = tensors_.first_block[tensors_.count];
    if (tensors_.count == tensors_.kCapacity || first + blocks > INT32_MAX) launch();
    const int i = tensors_.count++;
    tensors_.sizes[i] = n;
    tensors_.pointers[i] = pointers;
    tensors_.first_block[i + 1] = tensors_.first_block[i] + unsigned(blocks);
  }

  void launch() {
    const unsigned blocks = tensors_.first_block[tensors_.count];
    if (blocks == 0) return;
    launch_(blocks, tensors_);
    tensors_.count = 0;
  }

 private:
  int64_t chunk_;
  int64_t vec_;
  Launch launch_;
  TensorBatch<Pointers, kBytes> tensors_;
};

}  // namespace fastnn::cuda
