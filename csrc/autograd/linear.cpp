#include "autograd/linear.h"

#include <torch/library.h>

#include "autograd/backward_node.h"
#include "autograd/transforms.h"
#include "ops/linear.h"

namespace fastnn {
namespace {

using torch::autograd::variable_list;

template <bool relu>
struct LinearBackward {
  static constexpr auto name = relu ? "LinearReLUBackward" : "LinearBackward";
  using Tensors = std::array<at::Tensor, 3>;
  static constexpr std::array<bool, 3> kOutputs = {false, false, true};
  using Options = std::tuple<>;

  static variable_list backward(const at::Tensor& grad, const Tensors& tensors,
                                const Options& /*options*/,
                                const std::vector<bool>& needs_input_grad) {
    const auto& [input, weight, output] = tensors;
    const std::array<bool, 3> mask = {needs_input_grad[0], needs_input_grad[1],
                                      needs_input_grad[2]};
    const auto [grad_input, grad_weight, grad_bias] = [&] {
      const auto x = optional(input), w = optional(weight);
      if (backward_must_be_composite(grad)) {
        return linear_relu_backward_composite(grad, x, w, output, mask);
      }
      BelowAutograd below_autograd;
      return relu ? linear_relu_backward(grad, x, w, output, mask)
                  : linear_backward(grad, x, w, mask);
    }();
    return {grad_input, grad_weight, grad_bias};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_composite(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, std::array<bool, 3> output_mask) {
  return linear_relu_backward_composite(grad_output, input, weight, at::Tensor(), output_mask);
}

template <bool relu>
at::Tensor linear_below_autograd(const at::Tensor& input, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias) {
  BelowAutograd below_autograd;
  return relu ? linear_relu(input, weight, bias) : fastnn::linear(input, weight, bias);
}

// Each factor of the product is saved only for the other one's gradient.
template <bool relu>
void record_linear(const NodePointer<BackwardNode<LinearBackward<relu>>>& node,
                   const at::Tensor& output, const at::Tensor& input, const at::Tensor& weight) {
  const auto has_edge = [&](size_t i) { return node->next_edge(i).is_valid(); };
  record(node, output,
         {has_edge(1) ? input : at::Tensor(), has_edge(0) ? weight : at::Tensor(),
          relu ? output : at::Tensor()},
         {});
}

template <bool relu>
void give_history(const at::Tensor& output, const at::Tensor& input, const at::Tensor& weight,
                  torch::autograd::edge_list&& edges) {
  const auto node = make_node<BackwardNode<LinearBackward<relu>>>();
  node->set_next_edges(std::move(edges));
  record_linear<relu>(node, output, input, weight);
}

template <bool relu>
at::Tensor linear_recorded(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias) {
  const auto node =
      make_backward_node<LinearBackward<relu>>(input, weight, bias.value_or(at::Tensor()));
  const at::Tensor output = linear_below_autograd<relu>(input, weight, bias);
  record_linear<relu>(node, output, input, weight);
  return output;
}

template <bool relu>
at::Tensor linear_autograd(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias) {
  if (in_functorch() || has_tangent(input) || has_tangent(weight) || has_tangent(bias) ||
      !can_fuse_linear(input, weight, bias)) {
    return linear_composite<relu>(input, weight, bias);
  }
  if (needs_grad(input) || needs_grad(weight) || needs_grad(bias)) {
    return linear_recorded<relu>(input, weight, bias);
  }
  return linear_below_autograd<relu>(input, weight, bias);
}

}  // namespace

void give_linear_history(const at::Tensor& output, bool relu, const at::Tensor& input,
                         const at::Tensor& weight, torch::autograd::edge_list edges) {
  return relu ? give_history<true>(output, input, weight, std::move(edges))
              : give_history<false>(output, input, weight, std::move(edges));
}

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("linear", linear_autograd<false>);
  m.impl("linear_relu", linear_autograd<true>);
}

// vmap runs these on the whole batch at once; without them it would loop over the samples.
TORCH_LIBRARY_IMPL(fastnn, FuncTorchBatchedDecomposition, m) {
  m.impl("linear", linear_composite<false>);
  m.impl("linear_backward", linear_backward_composite);
  m.impl("linear_relu", linear_composite<true>);
  m.impl("linear_relu_backward", linear_relu_backward_composite);
}

}  // namespace fastnn
