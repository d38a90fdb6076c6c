#include "ops/linear_relu.h"

#include <ATen/ops/threshold_backward.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/transforms.h"

namespace fastnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A tensor's leading dimensions as one. Not reshape({-1, size}): over no elements that is
// ambiguous.
at::Tensor as_rows(const at::Tensor& tensor) {
  c10::SymInt rows = 1;
  for (const auto& size : tensor.sym_sizes().slice(0, tensor.dim() - 1)) rows *= size;
  return tensor.reshape_symint({rows, tensor.sym_size(-1)});
}

variable_list composite_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                 const at::Tensor& weight, const at::Tensor& output,
                                 std::array<bool, 3> mask) {
  const at::Tensor grad_linear = at::threshold_backward(grad_output, output, 0);
  const at::Tensor rows = as_rows(grad_linear);
  variable_list grads(3);
  if (mask[0]) grads[0] = grad_linear.matmul(weight);
  if (mask[1]) grads[1] = rows.t().matmul(as_rows(input));
  if (mask[2]) grads[2] = rows.sum(0);
  return grads;
}

struct LinearReLU : torch::autograd::Function<LinearReLU> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
    BelowAutograd below_autograd;
    at::Tensor output = linear_relu(input, weight, bias);
    ctx->save_for_backward({input, weight, output});
    ctx->saved_data["has_bias"] = bias.has_value();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto &input = saved[0], &weight = saved[1], &output = saved[2];
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      has_bias && ctx->needs_input_grad(2)};
    if (!grad_outputs[0].defined()) return variable_list(3);
    if (backward_must_be_composite(grad_outputs[0])) {
      return composite_backward(grad_outputs[0], input, weight, output, mask);
    }
    BelowAutograd below_autograd;
    auto [grad_input, grad_weight, grad_bias] =
        linear_relu_backward(grad_outputs[0], input, weight, output, mask);
    return {grad_input, grad_weight, grad_bias};
  }
};

at::Tensor linear_relu_autograd(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias) {
  if (in_functorch() || has_tangent(input) || has_tangent(weight) || has_tangent(bias) ||
      !linear_relu_is_fusable(input, weight, bias)) {
    return linear_relu_composite(input, weight, bias);
  }
  if (needs_grad(input) || needs_grad(weight) || needs_grad(bias)) {
    return LinearReLU::apply(input, weight, bias);
  }
  BelowAutograd below_autograd;
  return linear_relu(input, weight, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("linear_relu", linear_relu_autograd);
}

}  // namespace fastnn
