// Uninitialised memory for results.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastnn::cpu {

// at::empty on the CPU. Without the dispatcher, which costs more than many a small result, and in
// huge pages where it is large: writing to fresh memory first costs more than most kernels, one
// page fault for each 4 KiB.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace fastnn::cpu
