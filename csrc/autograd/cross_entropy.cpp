#include "ops/cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/softmax.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/loss_options.h"
#include "autograd/target_distribution.h"
#include "autograd/transforms.h"
#include "ops/checks.h"

namespace fastnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// grad * (softmax * sum(q) - q): the kernel's formula, in differentiable operators.
at::Tensor composite_backward(const at::Tensor& grad, const at::Tensor& input,
                              const at::Tensor& target, const std::optional<at::Tensor>& weight,
                              const at::Tensor& total_weight, int64_t ignore_index,
                              std::string_view reduction, double label_smoothing) {
  const int64_t dim = class_dim(input);
  const bool probabilities = has_class_probabilities(input, target);
  const at::Tensor q =
      probabilities ? probability_distribution(input, target, weight, label_smoothing)
                    : index_distribution(input, target, weight, ignore_index, label_smoothing);
  const at::Tensor grad_rows = grad_per_row(grad, input, total_weight, reduction);
  const at::Tensor grad_input =
      grad_rows * (at::softmax(input, dim) * q.sum(dim, /*keepdim=*/true) - q);
  return probabilities ? grad_input : zero_ignored_rows(grad_input, target, ignore_index);
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const std::optional<at::Tensor>& weight, int64_t ignore_index,
                            std::string_view reduction, double label_smoothing) {
    BelowAutograd below_autograd;
    auto [loss, lse, total_weight] =
        cross_entropy_forward(input, target, weight, ignore_index, reduction, label_smoothing);
    ctx->save_for_backward({input, target, weight.value_or(at::Tensor()), lse, total_weight});
    save_loss_options(ctx, {ignore_index, reduction, label_smoothing});
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto &input = saved[0], &target = saved[1], &lse = saved[3], &total_weight = saved[4];
    const auto weight = saved[2].defined() ? std::optional(saved[2]) : std::nullopt;
    const auto [ignore_index, reduction, label_smoothing] = saved_loss_options(ctx);
    const at::Tensor& grad = grad_outputs[0];

    variable_list grads(6);
    if (!grad.defined()) return grads;
    if (backward_must_be_composite(grad)) {
      grads[0] = composite_backward(grad, input, target, weight, total_weight, ignore_index,
                                    reduction, label_smoothing);
      return grads;
    }
    BelowAutograd below_autograd;
    grads[0] = cross_entropy_backward(grad, input, target, weight, lse, total_weight, ignore_index,
                                      reduction, label_smoothing);
    return grads;
  }
};

at::Tensor cross_entropy_autograd(const at::Tensor& input, const at::Tensor& target,
                                  const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                  std::string_view reduction, double label_smoothing) {
  // The fused backward gives the logits' gradient alone: probabilities or weights that want one
  // take torch's composite.
  if (in_functorch() || has_tangent(input) || has_tangent(target) || has_tangent(weight) ||
      needs_grad(target) || needs_grad(weight) ||
      !cross_entropy_is_fusable(input, target, weight, label_smoothing)) {
    return cross_entropy_composite(input, target, weight, ignore_index, reduction, label_smoothing);
  }
  if (needs_grad(input)) {
    return CrossEntropy::apply(input, target, weight, ignore_index, reduction, label_smoothing);
  }
  BelowAutograd below_autograd;
  return cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("cross_entropy", cross_entropy_autograd);
}

}  // namespace fastnn
