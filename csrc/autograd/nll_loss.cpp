#include "ops/nll_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "autograd/backward_node.h"
#include "autograd/target_distribution.h"
#include "autograd/transforms.h"
#include "ops/checks.h"

namespace fastnn {
namespace {

at::Tensor nll_loss_backward_composite(const at::Tensor& grad, const at::Tensor& input,
                                       const at::Tensor& target, const at::Tensor& total_weight,
                                       const LossOptions& options) {
  const at::Tensor wide = options.cast(input);
  const at::Tensor q = index_distribution(wide, target, options);
  const at::Tensor grad_input = -q * grad_per_row(grad, wide, total_weight, options.reduction);
  const at::Tensor result =
      zero_ignored_rows(grad_input, target, options.ignore_index).to(input.scalar_type());
  // As in torch, the result is a function of the input, with a gradient of zero.
  return at::where(at::zeros_like(result, at::kBool), input, result);
}

// The backward of an identity, which makes a tensor a function of the running node's input.
struct InputBackward {
  static constexpr auto name = "NLLLossInputBackward";
  using Tensors = std::array<at::Tensor, 0>;
  static constexpr std::array<bool, 0> kOutputs = {};
  using Options = std::tuple<>;

  static torch::autograd::variable_list backward(const at::Tensor& grad, const Tensors& /*none*/,
                                                 const Options& /*none*/,
                                                 const std::vector<bool>& /*needs_input_grad*/) {
    return {grad};
  }
};

at::Tensor with_history(const at::Tensor& input) {
  if (!at::GradMode::is_enabled() || input.requires_grad()) return input;
  const at::Tensor result = input.detach();
  const auto node = make_node<BackwardNode<InputBackward>>();
  node->add_next_edge(torch::autograd::get_current_node()->next_edge(0));
  record(node, result, {}, {});
  return result;
}

// The backward reads only the input's shape. Where torch would save a cast copy, the input may be
// overwritten later, so what is saved has a version counter of its own.
at::Tensor saved_input(const at::Tensor& input, const LossOptions& options) {
  return options.dtype_of_loss(input) == input.scalar_type() ? input : input.variable_data();
}

struct NLLLossBackward {
  static constexpr auto name = "NLLLossBackward";
  using Tensors = std::array<at::Tensor, 4>;
  static constexpr std::array<bool, 4> kOutputs = {};
  using Options = std::tuple<int64_t, int64_t>;

  static torch::autograd::variable_list backward(const at::Tensor& grad, const Tensors& tensors,
                                                 const Options& saved_options,
                                                 const std::vector<bool>& /*needs_input_grad*/) {
    const auto& [input, target, weight, total_weight] = tensors;
    const auto [ignore_index, reduction] = saved_options;
    const LossOptions options{optional(weight), ignore_index, at::Reduction::Reduction(reduction),
                              0, grad.scalar_type()};
    if (backward_must_be_composite(grad)) {
      return {
          nll_loss_backward_composite(grad, with_history(input), target, total_weight, options)};
    }
    BelowAutograd below_autograd;
    return {nll_loss_backward(grad, input, target, total_weight, options)};
  }
};

at::Tensor nll_loss_recorded(const at::Tensor& input, const at::Tensor& target,
                             const LossOptions& options) {
  const auto node = make_backward_node<NLLLossBackward>(input);
  const auto [loss, total_weight] = [&] {
    BelowAutograd below_autograd;
    return nll_loss_forward(input, target, options);
  }();
  record(node, loss,
         {saved_input(input, options), target, options.weight.value_or(at::Tensor()), total_weight},
         {options.ignore_index, options.reduction});
  return loss;
}

at::Tensor nll_loss_autograd(const at::Tensor& input, const at::Tensor& target,
                             const LossOptions& options) {
  // torch itself rejects a weight that requires a gradient.
  if (in_functorch() || has_tangent(input) || has_tangent(options.weight) ||
      needs_grad(options.weight) || !can_fuse_nll_loss(input, target, options)) {
    return nll_loss_composite(input, target, options);
  }
  if (needs_grad(input)) return nll_loss_recorded(input, target, options);
  BelowAutograd below_autograd;
  return nll_loss(input, target, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("nll_loss", as_nll_loss<nll_loss_autograd>);
}

// vmap runs these on the whole batch at once; without them it would loop over the samples.
TORCH_LIBRARY_IMPL(fastnn, FuncTorchBatchedDecomposition, m) {
  m.impl("nll_loss", as_nll_loss<nll_loss_composite>);
  m.impl("nll_loss_backward", as_nll_loss_backward<nll_loss_backward_composite>);
}

}  // namespace fastnn
