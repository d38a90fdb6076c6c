#include "ops/nll_loss.h"

#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/loss_options.h"
#include "autograd/target_distribution.h"
#include "autograd/transforms.h"

namespace fastnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct NLLLoss : torch::autograd::Function<NLLLoss> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const std::optional<at::Tensor>& weight, int64_t ignore_index,
                            std::string_view reduction) {
    BelowAutograd below_autograd;
    auto [loss, total_weight] = nll_loss_forward(input, target, weight, ignore_index, reduction);
    ctx->save_for_backward({input, target, weight.value_or(at::Tensor()), total_weight});
    save_loss_options(ctx, {ignore_index, reduction, /*label_smoothing=*/0});
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto &input = saved[0], &target = saved[1], &total_weight = saved[3];
    const auto weight = saved[2].defined() ? std::optional(saved[2]) : std::nullopt;
    const auto [ignore_index, reduction, label_smoothing] = saved_loss_options(ctx);
    const at::Tensor& grad = grad_outputs[0];

    variable_list grads(5);
    if (!grad.defined()) return grads;
    if (backward_must_be_composite(grad)) {
      const at::Tensor q = index_distribution(input, target, weight, ignore_index, label_smoothing);
      const at::Tensor grad_input = -q * grad_per_row(grad, input, total_weight, reduction);
      grads[0] = zero_ignored_rows(grad_input, target, ignore_index);
      return grads;
    }
    BelowAutograd below_autograd;
    grads[0] =
        nll_loss_backward(grad, input, target, weight, total_weight, ignore_index, reduction);
    return grads;
  }
};

at::Tensor nll_loss_autograd(const at::Tensor& input, const at::Tensor& target,
                             const std::optional<at::Tensor>& weight, int64_t ignore_index,
                             std::string_view reduction) {
  // A weight that requires a gradient is refused by torch, in its own words.
  if (in_functorch() || has_tangent(input) || has_tangent(weight) || needs_grad(weight) ||
      !nll_loss_is_fusable(input, target, weight)) {
    return nll_loss_composite(input, target, weight, ignore_index, reduction);
  }
  if (needs_grad(input)) return NLLLoss::apply(input, target, weight, ignore_index, reduction);
  BelowAutograd below_autograd;
  return nll_loss(input, target, weight, ignore_index, reduction);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("nll_loss", nll_loss_autograd);
}

}  // namespace fastnn
