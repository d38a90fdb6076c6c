#include "ops/cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/softmax.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "autograd/backward_node.h"
#include "autograd/target_distribution.h"
#include "autograd/transforms.h"
#include "ops/checks.h"

namespace fastnn {
namespace {

// The derivative of a softmax with respect to its logits, which are the input of another node.
struct SoftmaxBackward {
  static constexpr auto name = "CrossEntropySoftmaxBackward";
  using Tensors = std::array<at::Tensor, 1>;
  static constexpr std::array<bool, 1> kOutputs = {true};
  using Options = std::tuple<int64_t>;

  static torch::autograd::variable_list backward(const at::Tensor& grad, const Tensors& tensors,
                                                 const Options& options,
                                                 const std::vector<bool>& /*needs_input_grad*/) {
    const auto& [softmax] = tensors;
    const auto [dim] = options;
    return {at::_softmax_backward_data(grad, softmax, dim, softmax.scalar_type())};
  }
};

// The softmax of the logits, from what the forward kept: they may have been overwritten or freed.
at::Tensor kept_softmax(const at::Tensor& kept, const at::Tensor& q, const at::Tensor& total,
                        const at::Tensor& total_weight, const LossOptions& options) {
  const at::NoGradGuard no_grad;
  if (!keeps_gradient(kept)) return at::softmax(kept, class_dim(kept), options.dtype);
  const at::Tensor softmax = ((options.is_mean() ? kept * total_weight : kept) + q) / total;
  // Where q sums to 0, the gradient neither determines the softmax nor depends on it.
  return softmax.masked_fill(total == 0, 0);
}

// If autograd is recording, makes the softmax a function of the running node's logits.
void record_softmax(const at::Tensor& softmax) {
  if (!at::GradMode::is_enabled()) return;
  const auto node = make_node<BackwardNode<SoftmaxBackward>>();
  node->add_next_edge(torch::autograd::get_current_node()->next_edge(0));
  record(node, softmax, {softmax}, {class_dim(softmax)});
}

// grad * (softmax * sum(q) - q): the kernel's formula, in differentiable operators. In a node of
// ours, the softmax must be linked to the logits.
at::Tensor composite_backward(const at::Tensor& grad, const at::Tensor& kept,
                              const at::Tensor& target, const at::Tensor& total_weight,
                              const LossOptions& options, bool in_node) {
  const bool probabilities = has_class_probabilities(kept, target);
  const at::Tensor like = options.cast(kept);
  at::Tensor q = probabilities ? probability_distribution(like, options.cast(target), options)
                               : index_distribution(like, target, options);
  if (!probabilities) q = zero_ignored_rows(q, target, options.ignore_index);
  const at::Tensor total = q.sum(class_dim(kept), /*keepdim=*/true);
  const at::Tensor softmax = kept_softmax(kept, q, total, total_weight, options);
  if (in_node) record_softmax(softmax);
  const at::Tensor derivative = softmax * total - q;
  const at::Tensor grad_rows = grad_per_row(grad, like, total_weight, options.reduction);
  if (probabilities) return (grad_rows * derivative).to(kept.scalar_type());
  // Zero the factor too: a mean over no rows is NaN, and a second derivative multiplies by it.
  const at::Tensor factor =
      zero_ignored_rows(grad_rows.expand_as(kept), target, options.ignore_index);
  return zero_ignored_rows(factor * derivative, target, options.ignore_index)
      .to(kept.scalar_type());
}

at::Tensor cross_entropy_backward_composite(const at::Tensor& grad, const at::Tensor& kept,
                                            const at::Tensor& target,
                                            const std::optional<at::Tensor>& /*lse*/,
                                            const at::Tensor& total_weight,
                                            const LossOptions& options) {
  return composite_backward(grad, kept, target, total_weight, options, /*in_node=*/false);
}

struct CrossEntropyBackward {
  static constexpr auto name = "CrossEntropyBackward";
  using Tensors = std::array<at::Tensor, 5>;
  static constexpr std::array<bool, 5> kOutputs = {};
  using Options = std::tuple<int64_t, int64_t, double>;

  static torch::autograd::variable_list backward(const at::Tensor& grad, Tensors&& tensors,
                                                 const Options& saved_options,
                                                 const std::vector<bool>& /*needs_input_grad*/) {
    auto& [kept, target, weight, lse, total_weight] = tensors;
    const auto [ignore_index, reduction, label_smoothing] = saved_options;
    const LossOptions options{optional(weight), ignore_index, at::Reduction::Reduction(reduction),
                              label_smoothing, grad.scalar_type()};
    if (backward_must_be_composite(grad)) {
      return {composite_backward(grad, kept, target, total_weight, options, /*in_node=*/true)};
    }
    BelowAutograd below_autograd;
    if (!may_replace(kept, grad)) {
      return {cross_entropy_backward(grad, kept, target, optional(lse), total_weight, options)};
    }
    cross_entropy_backward_(grad, kept, target, optional(lse), total_weight, options);
    return {std::move(kept)};
  }
};

at::Tensor cross_entropy_recorded(const at::Tensor& input, const at::Tensor& target,
                                  const LossOptions& options) {
  const auto node = make_backward_node<CrossEntropyBackward>(input);
  const auto [loss, kept, lse, total_weight] = [&] {
    BelowAutograd below_autograd;
    return cross_entropy_forward(input, target, options, /*keep=*/true);
  }();
  record(node, loss, {kept, target, options.weight.value_or(at::Tensor()), lse, total_weight},
         {options.ignore_index, options.reduction, options.label_smoothing});
  return loss;
}

at::Tensor cross_entropy_autograd(const at::Tensor& input, const at::Tensor& target,
                                  const LossOptions& options) {
  // The fused backward only computes the logits' gradient: if probabilities or weights need one,
  // torch's composite computes it.
  if (in_functorch() || has_tangent(input) || has_tangent(target) || has_tangent(options.weight) ||
      needs_grad(target) || needs_grad(options.weight) ||
      !can_fuse_cross_entropy(input, target, options)) {
    return cross_entropy_composite(input, target, options);
  }
  if (needs_grad(input)) return cross_entropy_recorded(input, target, options);
  BelowAutograd below_autograd;
  return cross_entropy(input, target, options);
}

void cross_entropy_backward_inplace(const at::Tensor& grad_output, const at::Tensor& kept,
                                    const at::Tensor& target, const std::optional<at::Tensor>& lse,
                                    const at::Tensor& total_weight, const LossOptions& options) {
  {
    BelowAutograd below_autograd;
    cross_entropy_backward_(grad_output, kept, target, lse, total_weight, options);
  }
  if (!kept.is_inference()) torch::autograd::impl::bump_version(kept);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, ADInplaceOrView, m) {
  m.impl("cross_entropy_backward_", as_cross_entropy_backward<cross_entropy_backward_inplace>);
}

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("cross_entropy", as_cross_entropy<cross_entropy_autograd>);
}

// vmap runs these on the whole batch at once; without them it would loop over the samples.
TORCH_LIBRARY_IMPL(fastnn, FuncTorchBatchedDecomposition, m) {
  m.impl("cross_entropy", as_cross_entropy<cross_entropy_composite>);
  m.impl("cross_entropy_backward", as_cross_entropy_backward<cross_entropy_backward_composite>);
}

}  // namespace fastnn
