#include "ops/nll_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
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
  const at::Tensor q = index_distribution(input, target, options);
  const at::Tensor grad_input = -q * grad_per_row(grad, input, total_weight, options.reduction);
  const at::Tensor result = zero_ignored_rows(grad_input, target, options.ignore_index);
  // As in torch a function of the input, although it doesn't depend on it: its gradient is zero.
  return at::where(at::zeros_like(result, at::kBool), input, result);
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
    const LossOptions options{optional(weight), ignore_index, at::Reduction::Reduction(reduction)};
    if (backward_must_be_composite(grad)) {
      return {nll_loss_backward_composite(grad, input, target, total_weight, options)};
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
  record(node, loss, {input, target, options.weight.value_or(at::Tensor()), total_weight},
         {options.ignore_index, options.reduction});
  return loss;
}

at::Tensor nll_loss_autograd(const at::Tensor& input, const at::Tensor& target,
                             const LossOptions& options) {
  // A weight that requires a gradient is refused by torch, in its own words.
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
