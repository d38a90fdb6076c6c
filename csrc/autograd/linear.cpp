#include "ops/linear.h"

#include <ATen/ops/threshold_backward.h>
#include <torch/library.h>

#include "autograd/backward_node.h"
#include "autograd/transforms.h"

namespace fastnn {
namespace {

using torch::autograd::variable_list;

variable_list composite_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                 const at::Tensor& weight, const at::Tensor& output,
                                 std::array<bool, 3> mask) {
  const at::Tensor grad_linear = at::threshold_backward(grad_output, output, 0);
  const at::Tensor rows = matrix_of_rows(grad_linear);
  variable_list grads(3);
  if (mask[0]) grads[0] = grad_linear.matmul(weight);
  if (mask[1]) grads[1] = rows.t().matmul(matrix_of_rows(input));
  if (mask[2]) grads[2] = rows.sum(0);
  return grads;
}

struct LinearReLUBackward {
  static constexpr auto name = "LinearReLUBackward";
  using Tensors = std::array<at::Tensor, 3>;
  static constexpr std::array<bool, 3> kOutputs = {false, false, true};
  using Options = std::tuple<>;

  static variable_list backward(const at::Tensor& grad, const Tensors& tensors,
                                const Options& /*options*/,
                                const std::vector<bool>& needs_input_grad) {
    const auto& [input, weight, output] = tensors;
    const std::array<bool, 3> mask = {needs_input_grad[0], needs_input_grad[1],
                                      needs_input_grad[2]};
    if (backward_must_be_composite(grad)) {
      return composite_backward(grad, input, weight, output, mask);
    }
    BelowAutograd below_autograd;
    auto [grad_input, grad_weight, grad_bias] =
        linear_relu_backward(grad, optional(input), optional(weight), output, mask);
    return {grad_input, grad_weight, grad_bias};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward_composite(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask) {
  const variable_list grads =
      composite_backward(grad_output, input.value_or(at::Tensor()), weight.value_or(at::Tensor()),
                         output, output_mask);
  return {grads[0], grads[1], grads[2]};
}

at::Tensor linear_relu_recorded(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias) {
  const auto node =
      make_backward_node<LinearReLUBackward>(input, weight, bias.value_or(at::Tensor()));
  const at::Tensor output = [&] {
    BelowAutograd below_autograd;
    return linear_relu(input, weight, bias);
  }();
  // Each factor of the product is needed for the other one's gradient alone.
  record(node, output,
         {needs_grad(weight) ? input : at::Tensor(), needs_grad(input) ? weight : at::Tensor(),
          output},
         {});
  return output;
}

at::Tensor linear_relu_autograd(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias) {
  if (in_functorch() || has_tangent(input) || has_tangent(weight) || has_tangent(bias) ||
      !can_fuse_linear_relu(input, weight, bias)) {
    return linear_relu_composite(input, weight, bias);
  }
  if (needs_grad(input) || needs_grad(weight) || needs_grad(bias)) {
    return linear_relu_recorded(input, weight, bias);
  }
  BelowAutograd below_autograd;
  return linear_relu(input, weight, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("linear_relu", linear_relu_autograd);
}

// vmap: over the whole batch at once; without these it loops over the samples.
TORCH_LIBRARY_IMPL(fastnn, FuncTorchBatchedDecomposition, m) {
  m.impl("linear_relu", linear_relu_composite);
  m.impl("linear_relu_backward", linear_relu_backward_composite);
}

}  // namespace fastnn
