// Memory for results.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastnn::cpu {

// An uninitialized contiguous tensor, made without the dispatcher, which costs more than many small
// results. Large ones get huge pages: with a page fault per 4 KiB, the first write to fresh memory
// would cost more than most kernels.
at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType dtype);

// Zeros for a tensor so large that its memory comes from the system as zero pages: nothing is
// written, so only the pages written later cost anything. nullopt for smaller tensors.
std::optional<at::Tensor> large_zeros(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace fastnn::cpu
