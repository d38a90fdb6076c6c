// From tensors to launches of an operator over rows, with the memory that they need between them.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/ops/empty.h>

#include <cstdlib>
#include <string_view>

#include "cuda/launch.cuh"
#include "cuda/rows/launch.cuh"
#include "ops/checks.h"
#include "ops/operands.h"

namespace fastnn::cuda {

// For tests: FASTNN_CUDA_ROWS=subwarp|warp|block|split has all rows in one piece take one path.
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

// Partial sums of a loss: each block's, in its order.
struct BlockSums {
  at::Tensor memory;
  int64_t blocks = 0;

  BlockSums(int64_t blocks, const at::TensorOptions& options)
      : memory(at::empty({2 * blocks}, options.dtype(at::kDouble))), blocks(blocks) {
    static_assert(sizeof(LossSums) == 2 * sizeof(double));
  }
  LossSums* data() const {
    return static_cast<LossSums*>(memory.data_ptr());
  }
};

// Launches the operator; `sums`, of an operator that has them, is filled. On the current stream,
// whose order is also what keeps the memory between the launches safe to reuse.
template <typename Op>
void run_rows(const Op& op, const Plan& plan, const Layout& layout,
              const Tensors<typename Op::T>& tensors, const at::TensorOptions& options,
              const BlockSums* sums = nullptr) {
  const int64_t bytes = states_bytes<Op>(plan, layout.rows());
  const at::Tensor states = bytes > 0 ? at::empty({bytes}, options.dtype(at::kByte)) : at::Tensor();
  launch_rows(op, plan, layout, tensors, bytes > 0 ? states.data_ptr() : nullptr,
              sums ? sums->data() : nullptr, c10::cuda::getCurrentCUDAStream());
}

template <typename Op>
Plan plan_of(const Layout& layout) {
  return plan_rows(layout, row_traits<Op>(), forced_path());
}

// The reduced loss (unless `loss` is null) and the total weight from the blocks' sums. Over no
// elements both sums are 0.
template <typename T>
void run_finish_loss(const BlockSums& sums, bool empty, at::Reduction::Reduction reduction, T* loss,
                     const at::Tensor& total_weight) {
  FASTNN_LAUNCH((finish_loss<T>), 1, kFinishThreads, 0, c10::cuda::getCurrentCUDAStream(),
                sums.data(), empty ? 0 : sums.blocks, reduction == at::Reduction::Mean, loss,
                data<accum<T>>(total_weight));
}

}  // namespace fastnn::cuda
