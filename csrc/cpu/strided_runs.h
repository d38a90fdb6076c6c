// Tensors of one shape and any strides, a few elements of each at a time as one run of memory.
#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>

namespace fastnn::cpu {

class StridedRuns {
 public:
  // Tensors to read and write, then those to read alone, which may be copy-on-write. Pointers are
  // taken here.
  StridedRuns(at::TensorList written, at::TensorList read);

  // Calls f(runs, n) for elements [begin, end) in the order of memory: a pointer to n elements of
  // each tensor. Elements that lie apart are copied, and what f has written to them is copied back.
  using Step = c10::function_ref<void(void* const* runs, int64_t n)>;
  void for_each(int64_t begin, int64_t end, Step f) const;

 private:
  at::TensorIterator iterator_;
};

}  // namespace fastnn::cpu
