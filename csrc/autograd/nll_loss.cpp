#include "ops/nll_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

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
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, total_weight] = nll_loss_forward(input, target, weight, ignore_index, reduction);
    ctx->save_for_backward({input, target, weight.value_or(at::Tensor()), total_weight});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["reduction"] = reduction;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto &input = saved[0], &target = saved[1], &total_weight = saved[3];
    const auto weight = saved[2].defined() ? std::optional(saved[2]) : std::nullopt;
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const std::string_view reduction = ctx->saved_data["reduction"].toStringView();
    const at::Tensor& grad = grad_outputs[0];

    variable_list grads(5);
    if (!grad.defined()) return grads;
    if (backward_must_be_composite()) {
      const at::Tensor q = index_distribution(input, target, weight, ignore_index, 0);
      const at::Tensor grad_input = -q * grad_per_row(grad, input, total_weight, reduction);
      grads[0] = zero_ignored_rows(grad_input, target, ignore_index);
    } else {
      grads[0] =
          nll_loss_backward(grad, input, target, weight, total_weight, ignore_index, reduction);
    }
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
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return nll_loss(input, target, weight, ignore_index, reduction);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("nll_loss", nll_loss_autograd);
}

}  // namespace fastnn
