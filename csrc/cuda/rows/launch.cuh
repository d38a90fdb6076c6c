// From a plan to launches of the kernels over rows.
#pragma once

#include <c10/cuda/CUDAException.h>

#include "cuda/rows/kernels.cuh"

namespace fastnn::cuda {

template <RowOperator Op>
constexpr RowTraits row_traits() {
  const int inputs = std::max(Op::kReduceInputs, Op::kMapInputs);
  return {.element_bytes = sizeof(typename Op::T),
          .state_bytes = Op::kReduceInputs > 0 ? int64_t{sizeof(typename Op::State)} : 0,
          .tensors = std::max(inputs, 1),
          .maps = Op::kMaps,
          .rereads = kRereads<Op>,
          .sums = Op::kSums};
}

// Bytes of the states that the first launch of a split plan leaves for the second.
template <RowOperator Op>
int64_t states_bytes(const Plan& plan, int64_t rows) {
  return plan.path == Path::Split ? rows * plan.slices * row_traits<Op>().state_bytes : 0;
}

// `states` is of states_bytes; `sums` of plan.last_blocks, or null where the operator has none.
template <RowOperator Op>
void launch_rows(const Op& op, const Plan& plan, const Layout& layout,
                 const Tensors<typename Op::T>& tensors, void* states, LossSums* sums,
                 cudaStream_t stream) {
  static_assert(32 * (sizeof(typename Op::State) + sizeof(LossSums)) <= kReductionBytes);
  const int64_t rows = layout.rows(), classes = layout.classes;
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>(plan.blocks);
  const auto last_blocks = static_cast<unsigned>(plan.last_blocks);
  const auto threads = static_cast<unsigned>(plan.threads);
  const auto shared = static_cast<size_t>(plan.shared_bytes);
  switch (plan.path) {
    case Path::Subwarp:
      FASTNN_LAUNCH((subwarp_rows<Op>), blocks, threads, shared, stream, op, tensors, rows, classes,
                    plan.lanes, plan.tile_rows, sums);
      return;
    case Path::Warp:
      FASTNN_LAUNCH((team_rows<Op, true>), blocks, threads, shared, stream, op, tensors, rows,
                    classes, plan.cached, sums);
      return;
    case Path::Block:
      FASTNN_LAUNCH((team_rows<Op, false>), blocks, threads, shared, stream, op, tensors, rows,
                    classes, plan.cached, sums);
      return;
    case Path::Split: {
      auto* state_of_slice = static_cast<typename Op::State*>(states);
      if constexpr (Op::kReduceInputs > 0) {
        FASTNN_LAUNCH((split_reduce<Op>), blocks, threads, 0, stream, op, tensors, rows, classes,
                      plan.slices, plan.slice_size, state_of_slice);
      }
      FASTNN_LAUNCH((split_finish<Op>), last_blocks, Op::kMaps ? threads : 32, 0, stream, op,
                    tensors, rows, classes, plan.slices, plan.slice_size, state_of_slice, sums);
      return;
    }
    case Path::Strided:
      FASTNN_LAUNCH((strided_rows<Op>), blocks, threads, shared, stream, op, tensors, rows, classes,
                    layout.inner, static_cast<int>(plan.slices), plan.slice_size, sums);
      return;
  }
}

}  // namespace fastnn::cuda
