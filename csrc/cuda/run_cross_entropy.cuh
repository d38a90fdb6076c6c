// Converts tensors to arguments of cross_entropy's kernels, also for linear_cross_entropy's blocks.
#pragma once

#include <ATen/ops/empty.h>

#include "cuda/cross_entropy_kernels.cuh"
#include "cuda/rows/run.cuh"
#include "cuda/run_loss.cuh"
#include "ops/cross_entropy.h"

namespace fastnn::cuda {

// The operands and options of a call, as arguments of the kernels.
struct CrossEntropyCall : CrossEntropyOperands {
  CrossEntropyCall(const at::Tensor& input, const at::Tensor& target, const LossOptions& options)
      : CrossEntropyOperands(input, target, options) {
    if (options.dtype_of_loss(input) == input.scalar_type()) return;
    logits = from_vector_boundary(logits);
    if (probabilities) this->target = from_vector_boundary(this->target);
  }

  double uniform() const {
    return options.label_smoothing / static_cast<double>(std::max<int64_t>(layout.classes, 1));
  }
  template <typename T>
  CrossEntropyArgs<T> as() const {
    return {.logits = const_data<T>(logits),
            .classes = layout.classes,
            .inner = layout.inner,
            .target = indices(),
            .target_probs = target_probs<T>(),
            .weight = const_data_or_null<Wide<T>>(options.weight),
            .ignore_index = options.ignore_index,
            .keep = static_cast<accum<T>>(1 - options.label_smoothing),
            .uniform = static_cast<accum<T>>(uniform())};
  }
};

// Calls f.template operator()<Kind>() with the kind of the targets.
template <typename F>
void with_kind(const CrossEntropyCall& call, F f) {
  if (call.probabilities) return f.template operator()<TargetKind::Probabilities>();
  if (call.options.label_smoothing != 0) return f.template operator()<TargetKind::SmoothedIndex>();
  return f.template operator()<TargetKind::Index>();
}

// Up to this many rows, one block sums the weights.
inline constexpr int64_t kWeighedByOne = 8192;

// Computes the divisor of 'mean' from the targets alone.
template <typename T>
void run_target_weights(const CrossEntropyArgs<T>& args, int64_t rows, const at::Tensor& total) {
  const int64_t blocks = rows <= kWeighedByOne ? 1
                                               : clamp(ceil_div<int64_t>(rows, 4 * kMaxRowThreads),
                                                       1, kMaxSummingBlocks);
  const BlockSums sums(blocks, total.options());
  const LossResult<T> result{.loss = nullptr, .total_weight = data<accum<T>>(total), .mean = false};
  FASTNN_LAUNCH((sum_target_weights_kernel<T>), static_cast<unsigned>(blocks), kMaxRowThreads, 0,
                c10::cuda::getCurrentCUDAStream(), args, rows, sums.data(), result);
  run_finish_loss(sums, /*empty=*/false, result);
}

// The sum over classes of label smoothing's part of q.
template <typename T>
struct UniformSumMemory {
  at::Tensor weighted;
  accum<T> unweighted;

  UniformSumMemory(const CrossEntropyCall& call, const at::TensorOptions& options)
      : unweighted(accum<T>(call.options.label_smoothing)) {
    if (call.probabilities || unweighted == 0 || !call.options.weight) return;
    weighted = at::empty({}, options);
    FASTNN_LAUNCH((sum_class_weights_kernel<T>), 1, kMaxRowThreads, 0,
                  c10::cuda::getCurrentCUDAStream(), const_data<Wide<T>>(*call.options.weight),
                  call.layout.classes, call.uniform(), data<accum<T>>(weighted));
  }
  UniformSum<accum<T>> sum() const {
    return {unweighted, weighted.defined() ? const_data<accum<T>>(weighted) : nullptr};
  }
};

// The tensors of the backward's rows: the probabilities, if any, then the logits.
template <typename T, typename Out>
Tensors<T, Out> backward_tensors(const CrossEntropyCall& call, const T* logits, Out* gradient) {
  if (!call.probabilities) return {{logits, nullptr}, gradient};
  return {{call.target_probs<T>(), logits}, gradient};
}

}  // namespace fastnn::cuda
