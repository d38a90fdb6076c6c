// Launches the kernel that reduces a loss over all rows.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/ops/empty.h>

#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "ops/operands.h"

namespace fastnn::cuda {

// The blocks' partial sums of a loss, in the order of the blocks.
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

// Sets the result from the blocks' sums; a single block has set it itself. Over no elements both
// sums are 0.
template <typename T>
void run_finish_loss(const BlockSums& sums, bool empty, const LossResult<T>& result) {
  if (sums.blocks == 1 && !empty) return;
  FASTNN_LAUNCH((finish_loss_kernel<T>), 1, kFinishThreads, 0, c10::cuda::getCurrentCUDAStream(),
                sums.data(), empty ? 0 : sums.blocks, result);
}

}  // namespace fastnn::cuda
