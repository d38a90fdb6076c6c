// Iterates over tensors of one shape and any strides, in runs of a few elements of each in memory.
#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>

namespace fastnn::cpu {

class StridedRuns {
 public:
  // Tensors to read and write, then those only to read, which may be copy-on-write. Pointers are
  // taken here.
  StridedRuns(at::TensorList written, at::TensorList read);

  // Calls f(runs, n) for elements [begin, end) in memory order: pointers to n elements of each
  // tensor. Elements that aren't contiguous are copied; those that may be written are copied back.
  using Step = c10::function_ref<void(void* const* runs, int64_t n)>;
  void for_each(int64_t begin, int64_t end, Step f) const;

 private:
  at::TensorIterator iterator_;
};

}  // namespace fastnn::cpu
