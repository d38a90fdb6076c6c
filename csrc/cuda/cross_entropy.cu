// cross_entropy on CUDA devices.
#include "ops/cross_entropy.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/cross_entropy_kernels.cuh"
#include "cuda/run_rows.cuh"

namespace fastnn::cuda {
namespace {

struct Operands : CrossEntropyOperands {
  using CrossEntropyOperands::CrossEntropyOperands;

  double uniform() const {
    return label_smoothing / static_cast<double>(std::max<int64_t>(layout.classes, 1));
  }
  template <typename T>
  CrossEntropy<T> as() const {
    return {.logits = const_data<T>(logits),
            .classes = layout.classes,
            .inner = layout.inner,
            .target = indices(),
            .target_probs = target_probs<T>(),
            .weight = const_data_or_null<T>(weight),
            .ignore_index = ignore_index,
            .keep = static_cast<accum<T>>(1 - label_smoothing),
            .uniform = static_cast<accum<T>>(uniform())};
  }
};

// Calls f.template operator()<T, Kind>() with the storage type and the kind of the targets.
template <typename F>
void dispatch_kind(const Operands& operands, std::string_view op, F f) {
  dispatch(operands.logits.scalar_type(), op, [&]<typename T>() {
    if (operands.probabilities) return f.template operator()<T, TargetKind::Probabilities>();
    if (operands.label_smoothing != 0) {
      return f.template operator()<T, TargetKind::SmoothedIndex>();
    }
    return f.template operator()<T, TargetKind::Index>();
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward_cuda(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    int64_t ignore_index, std::string_view reduction_name, double label_smoothing) {
  check_cross_entropy(input, target, weight, ignore_index, label_smoothing);
  const auto reduction = parse_reduction(reduction_name);
  const c10::cuda::CUDAGuard guard(input.device());
  const Operands operands(input, target, weight, ignore_index, label_smoothing);
  const auto in_accum = input.options().dtype(accumulate_dtype(input));
  const bool per_row = reduction == at::Reduction::None;
  const at::Tensor lse = at::empty(lse_sizes(input), in_accum);
  const at::Tensor loss =
      at::empty(per_row ? per_row_sizes(input) : at::DimVector{}, input.options());
  const at::Tensor total_weight = at::empty({}, in_accum);

  const Layout& layout = operands.layout;
  dispatch_kind(operands, "cross_entropy", [&]<typename T, TargetKind Kind>() {
    using Op = CrossEntropyForward<T, Kind>;
    const Plan plan = plan_of<Op>(layout);
    const BlockSums sums(plan.last_blocks, input.options());
    auto* max = data<accum<T>>(lse);
    const Op op{.args = operands.as<T>(),
                .max = max,
                .log_sum = max + layout.rows(),
                .losses = per_row ? data<T>(loss) : nullptr};
    const Tensors<T> tensors{{op.args.logits, op.args.target_probs}, nullptr};
    run_rows(op, plan, layout, tensors, input.options(), &sums);
    // Torch's rule: over nothing, the mean of probabilities is NaN as that of class indices is.
    run_finish_loss<T>(sums, /*empty=*/input.numel() == 0, reduction,
                       per_row ? nullptr : data<T>(loss), total_weight);
  });
  return {loss, lse, total_weight};
}

// The sum over classes of label smoothing's part of q, where class weights make it.
template <typename T>
at::Tensor weighted_uniform_sum(const Operands& operands, const at::TensorOptions& options) {
  const at::Tensor sum = at::empty({}, options);
  FASTNN_LAUNCH((sum_class_weights<T>), 1, kMaxRowThreads, 0, c10::cuda::getCurrentCUDAStream(),
                const_data<T>(*operands.weight), operands.layout.classes, operands.uniform(),
                data<accum<T>>(sum));
  return sum;
}

at::Tensor cross_entropy_backward_cuda(const at::Tensor& grad_output, const at::Tensor& input,
                                       const at::Tensor& target,
                                       const std::optional<at::Tensor>& weight,
                                       const at::Tensor& lse, const at::Tensor& total_weight,
                                       int64_t ignore_index, std::string_view reduction_name,
                                       double label_smoothing) {
  check_cross_entropy(input, target, weight, ignore_index, label_smoothing);
  const auto reduction = parse_reduction(reduction_name);
  check_cross_entropy_backward(grad_output, input, lse, total_weight, reduction);
  const c10::cuda::CUDAGuard guard(input.device());
  const Operands operands(input, target, weight, ignore_index, label_smoothing);
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor saved_lse = lse.contiguous();
  const at::Tensor grad_logits = at::empty(operands.logits.sizes(), input.options());

  const Layout& layout = operands.layout;
  dispatch_kind(operands, "cross_entropy_backward", [&]<typename T, TargetKind Kind>() {
    using Op = CrossEntropyBackward<T, Kind>;
    using A = accum<T>;
    at::Tensor weighted_sum;
    if (Kind == TargetKind::SmoothedIndex && operands.weight) {
      weighted_sum = weighted_uniform_sum<T>(operands, total_weight.options());
    }
    const bool mean = reduction == at::Reduction::Mean;
    const A* max = const_data<A>(saved_lse);
    const Op op{
        .args = operands.as<T>(),
        .max = max,
        .log_sum = max + layout.rows(),
        .grad = {.grad = const_data<T>(grad),
                 .per_row = reduction == at::Reduction::None,
                 .total_weight = mean ? const_data<A>(total_weight) : nullptr},
        .uniform_sum = static_cast<A>(label_smoothing),
        .weighted_uniform_sum = weighted_sum.defined() ? const_data<A>(weighted_sum) : nullptr};
    Tensors<T> tensors{{op.args.logits, nullptr}, data<T>(grad_logits)};
    if (operands.probabilities) {
      tensors.in[0] = op.args.target_probs;
      tensors.in[1] = op.args.logits;
    }
    run_rows(op, plan_of<Op>(layout), layout, tensors, input.options());
  });
  return operands.in_shape_of_input(grad_logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("cross_entropy_forward", cross_entropy_forward_cuda);
  m.impl("cross_entropy_backward", cross_entropy_backward_cuda);
}

}  // namespace fastnn::cuda
