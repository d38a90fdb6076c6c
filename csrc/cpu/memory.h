// Memory for results.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastnn::cpu {

// A contiguous tensor of nothing in particular yet. It is made without the dispatcher, which costs
// more than many a small result, and in huge pages where it is large: writing to fresh memory first
// costs more than most kernels, one page fault for each 4 KiB.
at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType dtype);

// Zeros that need not be written, where the tensor is so large that its memory comes fresh from the
// system anyway, as zero pages: what few elements are then written cost a page each, not the whole.
std::optional<at::Tensor> large_zeros(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace fastnn::cpu
