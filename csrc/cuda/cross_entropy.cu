// cross_entropy on CUDA devices.
#include "ops/cross_entropy.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/rows/run.cuh"
#include "cuda/run_cross_entropy.cuh"

namespace fastnn::cuda {
namespace {

// Up to this many rows, each block of the forward sums all rows' weights itself.
constexpr int64_t kWeighedByEach = 1024;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward_cuda(
    const at::Tensor& input, const at::Tensor& target, const LossOptions& options, bool keep) {
  check_cross_entropy(input, target, options);
  const c10::cuda::CUDAGuard guard(input.device());
  const CrossEntropyCall operands(input, target, options);
  const auto in_accum = input.options().dtype(accumulate_dtype(input));
  const bool per_row = options.per_row();
  at::Tensor kept, lse;
  if (keep) kept = at::empty(operands.logits.sizes(), input.options());
  if (keep && !keeps_gradient(input)) lse = at::empty(lse_sizes(input), in_accum);
  const at::Tensor loss = at::empty(per_row ? per_row_sizes(input) : at::DimVector{},
                                    input.options().dtype(options.dtype_of_loss(input)));
  const at::Tensor total_weight = at::empty({}, in_accum);

  const Layout& layout = operands.layout;
  const auto run = [&]<typename Op>(const Op& op) {
    using T = typename Op::T;
    const Plan plan = plan_of<Op>(layout);
    const BlockSums sums(summing_blocks(plan), input.options());
    const Tensors<T> tensors{{op.args.logits, op.args.target_probs},
                             keep ? data<T>(kept) : nullptr};
    run_rows(op, plan, layout, tensors, input.options(), sums.data());
    // As in torch, the mean over no elements is NaN for probabilities as for class indices.
    run_finish_loss(sums, /*empty=*/input.numel() == 0, op.result);
  };
  dispatch_widened(input.scalar_type(), loss.scalar_type(), "cross_entropy", [&]<typename T>() {
    with_kind(operands, [&]<TargetKind Kind>() {
      using A = accum<T>;
      A* max = lse.defined() ? data<A>(lse) : nullptr;
      const CrossEntropyForwardRows<T, Kind> forward{
          .args = operands.as<T>(),
          .losses = per_row ? data<Wide<T>>(loss) : nullptr,
          .max = max,
          .sum = max ? max + layout.rows() : nullptr,
          .result = {.loss = per_row ? nullptr : data<Wide<T>>(loss),
                     .total_weight = data<A>(total_weight),
                     .mean = options.is_mean()}};
      if (!keep) {
        run(forward);
      } else if constexpr (!kKeepsGradient<T>) {
        run(CrossEntropyCopyingRows<T, Kind>{forward});
      } else {
        const UniformSumMemory<T> uniform(operands, in_accum);
        CrossEntropyGradientRows<T, Kind> op{forward, A(1), uniform.sum()};
        if (options.is_mean() && operands.probabilities) {
          op.scale = A(1) / static_cast<A>(std::max<int64_t>(layout.rows(), 1));
        } else if (options.is_mean() && layout.rows() <= kWeighedByEach) {
          op.weighed_rows = layout.rows();
        } else if (options.is_mean()) {
          run_target_weights(forward.args, layout.rows(), total_weight);
          op.total_weight = data<A>(total_weight);
        }
        run(op);
      }
    });
  });
  return {loss, keep ? operands.in_shape_of_input(kept) : kept, lse, total_weight};
}

// Computes the gradient from the forward's copy of the logits, which it may overwrite.
template <typename T, TargetKind Kind>
void run_backward(const at::Tensor& grad_logits, const CrossEntropyCall& operands,
                  const at::Tensor& grad, const at::Tensor& lse, const at::Tensor& total_weight) {
  using Op = CrossEntropyBackwardRows<T, Kind>;
  using A = accum<T>;
  const Layout& layout = operands.layout;
  const UniformSumMemory<T> uniform(operands, total_weight.options());
  const A* max = const_data<A>(lse);
  const Op op{
      .args = operands.as<T>(),
      .max = max,
      .sum = max + layout.rows(),
      .grad = {.grad = const_data<Wide<T>>(grad),
               .per_row = operands.options.per_row(),
               .total_weight = operands.options.is_mean() ? const_data<A>(total_weight) : nullptr},
      .uniform_sum = uniform.sum()};
  run_rows(op, plan_of<Op>(layout), layout,
           backward_tensors(operands, op.args.logits, data<T>(grad_logits)), grad_logits.options());
}

// Scales the gradient that the forward kept, in place or into another tensor.
template <typename T>
void run_scale(const at::Tensor& grad_logits, const CrossEntropyCall& operands,
               const at::Tensor& grad) {
  using Op = ScaleGradientRows<T>;
  const T* kept = const_data<T>(operands.logits);
  const Op op{.target = operands.indices(),
              .ignore_index = operands.options.ignore_index,
              .grad = {.grad = const_data<T>(grad),
                       .per_row = operands.options.per_row(),
                       .total_weight = nullptr},
              .in_place = kept == data<T>(grad_logits)};
  run_rows(op, plan_of<Op>(operands.layout), operands.layout,
           Tensors<T>{{kept, nullptr}, data<T>(grad_logits)}, grad_logits.options());
}

// Writes the gradient, laid out like the operands' logits: these are what the forward kept, and
// both may share memory.
void write_gradient(const at::Tensor& grad_logits, const CrossEntropyCall& operands,
                    const at::Tensor& grad_output, const std::optional<at::Tensor>& lse,
                    const at::Tensor& total_weight) {
  const at::Tensor grad = grad_output.contiguous();
  const auto op = "cross_entropy_backward";
  dispatch_widened(grad_logits.scalar_type(), grad.scalar_type(), op, [&]<typename T>() {
    if constexpr (kKeepsGradient<T>) {
      run_scale<T>(grad_logits, operands, grad);
    } else {
      const at::Tensor saved_lse = lse->contiguous();
      with_kind(operands, [&]<TargetKind Kind>() {
        run_backward<T, Kind>(grad_logits, operands, grad, saved_lse, total_weight);
      });
    }
  });
}

at::Tensor cross_entropy_backward_cuda(const at::Tensor& grad_output, const at::Tensor& kept,
                                       const at::Tensor& target,
                                       const std::optional<at::Tensor>& lse,
                                       const at::Tensor& total_weight, const LossOptions& options) {
  check_cross_entropy_backward(grad_output, kept, target, lse, total_weight, options);
  const c10::cuda::CUDAGuard guard(kept.device());
  const CrossEntropyCall operands(kept, target, options);
  const at::Tensor grad_logits = at::empty(operands.logits.sizes(), kept.options());
  write_gradient(grad_logits, operands, grad_output, lse, total_weight);
  return operands.in_shape_of_input(grad_logits);
}

void cross_entropy_backward_cuda_(const at::Tensor& grad_output, const at::Tensor& kept,
                                  const at::Tensor& target, const std::optional<at::Tensor>& lse,
                                  const at::Tensor& total_weight, const LossOptions& options) {
  check_cross_entropy_backward(grad_output, kept, target, lse, total_weight, options);
  const c10::cuda::CUDAGuard guard(kept.device());
  const CrossEntropyCall operands(kept, target, options);
  write_gradient(operands.logits, operands, grad_output, lse, total_weight);
  // If the kernels don't support the strides, the operands are a copy.
  if (!operands.logits.is_alias_of(kept)) kept.copy_(operands.in_shape_of_input(operands.logits));
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("cross_entropy_forward", as_cross_entropy_forward<cross_entropy_forward_cuda>);
  m.impl("cross_entropy_backward", as_cross_entropy_backward<cross_entropy_backward_cuda>);
  m.impl("cross_entropy_backward_", as_cross_entropy_backward<cross_entropy_backward_cuda_>);
}

}  // namespace fastnn::cuda
