// Iterates over tensors of one shape and any strides, in short runs of contiguous elements of each.
#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>

namespace fastnn::cpu {

class StridedRuns {
 public:
  // `written` is read and written; `read` is only read, and may be copy-on-write. The constructor
  // takes the data pointers.
  StridedRuns(at::TensorList written, at::TensorList read);

  // Calls f(runs, n) for elements [begin, end) in memory order: pointers to n elements of each
  // tensor. Elements that aren't contiguous are copied; those that may be written are copied back.
  using Step = c10::function_ref<void(void* const* runs, int64_t n)>;
  void for_each(int64_t begin, int64_t end, Step f) const;

 private:
  at::TensorIterator iterator_;
};

}  // namespace fastnn::cpu
