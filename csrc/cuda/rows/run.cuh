// Launches an operator over the rows of tensors, with the memory that the launches share.
#pragma once

#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>

#include <cstdlib>
#include <string_view>

#include "cuda/launch.cuh"
#include "cuda/rows/launch.cuh"
#include "ops/checks.h"

namespace fastnn::cuda {

// For tests: FASTNN_CUDA_ROWS=subwarp|warp|block|split makes all contiguous rows take one path.
inline std::optional<Path> forced_path() {
  const char* value = std::getenv("FASTNN_CUDA_ROWS");
  const std::string_view name = value ? value : "";
  if (name.empty()) return std::nullopt;
  if (name == "subwarp") return Path::Subwarp;
  if (name == "warp") return Path::Warp;
  if (name == "block") return Path::Block;
  if (name == "split") return Path::Split;
  TORCH_CHECK_VALUE(false, "FASTNN_CUDA_ROWS must be subwarp, warp, block or split, not '", name,
                    "'");
}

// Launches the operator on the current stream, whose order also makes it safe to reuse the memory
// between the launches. `sums` has room for summing_blocks(plan) sums, or is null if the operator
// has none.
template <RowOperator Op>
void run_rows(const Op& op, const Plan& plan, const Layout& layout, const TensorsOf<Op>& tensors,
              const at::TensorOptions& options, LossSums* sums = nullptr) {
  const int64_t bytes = states_bytes<Op>(plan, layout.rows());
  const at::Tensor states = bytes > 0 ? at::empty({bytes}, options.dtype(at::kByte)) : at::Tensor();
  launch_rows(op, plan, layout, tensors, bytes > 0 ? states.data_ptr() : nullptr, sums,
              c10::cuda::getCurrentCUDAStream());
}

// An operand whose results must have the bits of a wider copy's, which starts at a vector's
// boundary: rows that don't are summed in other groups of classes. A copy of the same dtype if it
// doesn't.
inline at::Tensor from_vector_boundary(const at::Tensor& operand) {
  const auto address = reinterpret_cast<uintptr_t>(operand.const_data_ptr());
  return address % sizeof(uint4) == 0 ? operand : operand.clone();
}

inline int64_t device_shared_bytes() {
  int device = 0, bytes = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

template <RowOperator Op>
Plan plan_of(const Layout& layout) {
  RowTraits traits = row_traits<Op>();
  if (traits.rereads) traits.device_shared_bytes = device_shared_bytes();
  return plan_rows(layout, traits, forced_path());
}

}  // namespace fastnn::cuda
