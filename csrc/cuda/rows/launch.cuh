// Launches the kernels over rows by a plan.
#pragma once

#include <c10/cuda/CUDAException.h>

#include <variant>

#include "cuda/rows/kernels.cuh"

namespace fastnn::cuda {

template <RowOperator Op>
constexpr RowTraits row_traits() {
  const int inputs = std::max(Op::kReduceInputs, Op::kMapInputs);
  return {.element_bytes = sizeof(Wide<typename Op::T>),
          .state_bytes = Op::kReduceInputs > 0 ? int64_t{sizeof(typename Op::State)} : 0,
          .tensors = std::max(inputs, 1),
          .maps = Op::kMaps,
          .rereads = kRereads<Op>,
          .has_threads_to_reread = kRereads<Op> || Op::kHasThreadsToReread,
          .sums = Op::kSums};
}

// Bytes of the states that the first launch of a split plan leaves for the second.
template <RowOperator Op>
int64_t states_bytes(const Plan& plan, int64_t rows) {
  const auto* split = std::get_if<SplitPlan>(&plan);
  return split ? rows * split->slices * row_traits<Op>().state_bytes : 0;
}

// The launches of each path's plan.
template <RowOperator Op>
struct RowsLauncher {
  const Op& op;
  const Layout& layout;
  const TensorsOf<Op>& tensors;
  typename Op::State* states;
  LossSums* sums;
  cudaStream_t stream;

  void operator()(const SubwarpPlan& plan) const {
    FASTNN_LAUNCH((subwarp_rows_kernel<Op>), unsigned(plan.blocks), kSubwarpThreads,
                  size_t(plan.shared_bytes), stream, op, tensors, layout.rows(), layout.classes,
                  plan.lanes, plan.tile_rows, sums);
  }
  void operator()(const WarpPlan& plan) const {
    FASTNN_LAUNCH((team_rows_kernel<Op, true>), unsigned(plan.blocks), kWarpThreads,
                  size_t(plan.cache_bytes), stream, op, tensors, layout.rows(), layout.classes,
                  plan.cache_bytes > 0, sums);
  }
  void operator()(const BlockPlan& plan) const {
    if (plan.cache_bytes > kSharedBytes) {
      C10_CUDA_CHECK(cudaFuncSetAttribute(team_rows_kernel<Op, false>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(plan.cache_bytes)));
    }
    FASTNN_LAUNCH((team_rows_kernel<Op, false>), unsigned(plan.blocks), unsigned(plan.threads),
                  size_t(plan.cache_bytes), stream, op, tensors, layout.rows(), layout.classes,
                  plan.cache_bytes > 0, sums);
  }
  void operator()(const SplitPlan& plan) const {
    const unsigned threads(plan.threads);
    if constexpr (Op::kReduceInputs > 0) {
      FASTNN_LAUNCH((split_reduce_kernel<Op>), unsigned(plan.reduce_blocks), threads, 0, stream, op,
                    tensors, layout.rows(), layout.classes, plan.slices, plan.slice_size, states);
    }
    FASTNN_LAUNCH((split_finish_kernel<Op>), unsigned(plan.blocks), Op::kMaps ? threads : 32, 0,
                  stream, op, tensors, layout.rows(), layout.classes, plan.slices, plan.slice_size,
                  states, sums);
  }
  void operator()(const StridedPlan& plan) const {
    if constexpr (Op::kStrided) {
      FASTNN_LAUNCH((strided_rows_kernel<Op>), unsigned(plan.blocks),
                    unsigned(plan.rows_at_once * plan.slices), size_t(plan.shared_bytes), stream,
                    op, tensors, layout.rows(), layout.classes, layout.inner, plan.slices,
                    plan.slice_size, sums);
    }
  }
};

// `states` has states_bytes bytes; `sums` has summing_blocks sums, or is null if there are none.
template <RowOperator Op>
void launch_rows(const Op& op, const Plan& plan, const Layout& layout, const TensorsOf<Op>& tensors,
                 void* states, LossSums* sums, cudaStream_t stream) {
  using State = typename Op::State;
  static_assert(32 * (sizeof(State) + sizeof(LossSums)) <= kReductionBytes);
  if (layout.rows() == 0) return;
  std::visit(RowsLauncher<Op>{.op = op,
                              .layout = layout,
                              .tensors = tensors,
                              .states = static_cast<State*>(states),
                              .sums = sums,
                              .stream = stream},
             plan);
}

}  // namespace fastnn::cuda
