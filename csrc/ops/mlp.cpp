#include "ops/mlp.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/linear.h"

namespace fastnn {

namespace {

template <typename Function>
auto operator_named(const char* name, Function* /*like*/) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

at::Tensor mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
               const Flags& relu) {
  static const auto op = operator_named("fastnn::mlp", mlp);
  return op.call(input, weights, biases, relu);
}

std::vector<at::Tensor> mlp_forward(const at::Tensor& input, at::TensorList weights,
                                    const OptionalTensors& biases, const Flags& relu) {
  static const auto op = operator_named("fastnn::mlp_forward", mlp_forward);
  return op.call(input, weights, biases, relu);
}

std::vector<at::Tensor> mlp_backward(const at::Tensor& grad_output, const OptionalTensors& inputs,
                                     const OptionalTensors& weights,
                                     const std::optional<at::Tensor>& output, const Flags& relu,
                                     const Flags& output_mask) {
  static const auto op = operator_named("fastnn::mlp_backward", mlp_backward);
  return op.call(grad_output, inputs, weights, output, relu, output_mask);
}

// ---- checks ----

bool can_fuse_mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases) {
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!can_fuse_linear(input, weights[i], biases.get(i))) return false;
  }
  return true;
}

void check_mlp_lists(at::TensorList weights, const OptionalTensors& biases, const Flags& relu) {
  TORCH_CHECK_VALUE(!weights.empty(), "mlp: expected weights for at least one layer, but got none");
  TORCH_CHECK_VALUE(biases.size() == weights.size(), "mlp: expected biases for ", weights.size(),
                    " layers, one per weight, but got ", biases.size());
  TORCH_CHECK_VALUE(relu.size() == weights.size(), "mlp: expected activations for ", weights.size(),
                    " layers, one per weight, but got ", relu.size());
}

void check_mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
               const Flags& relu) {
  check_mlp_lists(weights, biases, relu);
  TORCH_CHECK(input.sym_size(-1) == weights[0].sym_size(1),
              "mlp: expected input's last dimension to have weights[0]'s in_features ",
              weights[0].sym_size(1), ", but input has shape ", input.sym_sizes(),
              " and weights[0] ", weights[0].sym_sizes());
  for (size_t i = 1; i < weights.size(); ++i) {
    TORCH_CHECK(weights[i].sym_size(1) == weights[i - 1].sym_size(0), "mlp: expected weights[", i,
                "] to have in_features ", weights[i - 1].sym_size(0), ", weights[", i - 1,
                "]'s out_features, but it has shape ", weights[i].sym_sizes());
  }
}

namespace {

constexpr auto kBackward = "mlp_backward";

// The tensor at `layer` of the list `name`; raises if it is missing.
const at::Tensor& needed(const std::optional<at::Tensor>& tensor, const char* name, size_t layer) {
  TORCH_CHECK(tensor, kBackward, ": expected ", name, "[", layer,
              "] for a wanted gradient, but got None");
  return *tensor;
}

void check_like(const at::Tensor& grad_output, const std::string& name, const at::Tensor& tensor) {
  check_same_device(kBackward, grad_output, name, tensor, "grad_output");
  check_same_dtype(kBackward, grad_output, name, tensor, "grad_output");
}

}  // namespace

void check_mlp_backward(const at::Tensor& grad_output, const OptionalTensors& inputs,
                        const OptionalTensors& weights, const std::optional<at::Tensor>& output,
                        const Flags& relu, const Flags& output_mask) {
  const size_t layers = weights.size();
  TORCH_CHECK_VALUE(layers > 0, kBackward,
                    ": expected weights for at least one layer, but got none");
  TORCH_CHECK_VALUE(inputs.size() == layers, kBackward, ": expected inputs for ", layers,
                    " layers, one per weight, but got ", inputs.size());
  TORCH_CHECK_VALUE(relu.size() == layers, kBackward, ": expected relu for ", layers,
                    " layers, one per weight, but got ", relu.size());
  TORCH_CHECK_VALUE(output_mask.size() == 1 + 2 * layers, kBackward,
                    ": expected output_mask to have ", 1 + 2 * layers,
                    " elements, for the input, the weights and the biases, but got ",
                    output_mask.size());
  TORCH_CHECK(grad_output.dim() >= 1, kBackward,
              ": expected grad_output of 1 or more dimensions, but got shape ",
              grad_output.sizes());
  const WantedGradients wanted(output_mask);
  if (relu.get(layers - 1)) {
    TORCH_CHECK(output, kBackward, ": expected output, the last ReLU's, but got None");
    check_like(grad_output, "output", *output);
    check_sizes(kBackward, "output", *output, grad_output.sizes());
  }
  // The gradient's number of features, as it passes from the last layer to the first.
  int64_t features = grad_output.size(-1);
  for (size_t i = layers; i-- > 0 && wanted.reaches(i);) {
    const std::optional<at::Tensor> weight = weights.get(i), input = inputs.get(i);
    const std::string at = "[" + std::to_string(i) + "]";
    if (wanted.weight(i) || (wanted.passes(i) && i > 0 && relu.get(i - 1))) {
      const at::Tensor& x = needed(input, "inputs", i);
      check_like(grad_output, "inputs" + at, x);
      TORCH_CHECK(x.dim() >= 1, kBackward, ": expected inputs", at,
                  " of 1 or more dimensions, but got shape ", x.sizes());
      check_sizes(kBackward, "inputs" + at, x, with_last_size(grad_output, x.size(-1)));
    }
    if (!wanted.passes(i)) break;
    const at::Tensor& w = needed(weight, "weights", i);
    check_like(grad_output, "weights" + at, w);
    TORCH_CHECK(w.dim() == 2, kBackward, ": expected weights", at,
                " of 2 dimensions, but got shape ", w.sizes());
    check_sizes(kBackward, "weights" + at, w, {features, w.size(1)});
    if (input) check_sizes(kBackward, "inputs" + at, *input, with_last_size(*input, w.size(1)));
    features = w.size(1);
  }
}

WantedGradients::WantedGradients(const Flags& output_mask)
    : wanted_(output_mask.begin(), output_mask.end()), layers_(wanted_.size() / 2), first_(0) {
  if (input()) return;
  while (first_ < layers_ && !weight(first_) && !bias(first_)) ++first_;
}

// ---- composites ----

at::Tensor mlp_composite(const at::Tensor& input, at::TensorList weights,
                         const OptionalTensors& biases, const Flags& relu) {
  check_mlp_lists(weights, biases, relu);
  at::Tensor output = input;
  for (size_t i = 0; i < weights.size(); ++i) {
    output = relu.get(i) ? linear_composite<true>(output, weights[i], biases.get(i))
                         : linear_composite<false>(output, weights[i], biases.get(i));
  }
  return output;
}

namespace {

// Backpropagates through the layers with layer(grad_output, input, weight, output, wanted).
template <typename F>
std::vector<at::Tensor> backward_by_layers(const at::Tensor& grad_output,
                                           const OptionalTensors& inputs,
                                           const OptionalTensors& weights,
                                           const std::optional<at::Tensor>& output,
                                           const Flags& relu, const Flags& output_mask, F layer) {
  const size_t layers = weights.size();
  const WantedGradients wanted(output_mask);
  std::vector<at::Tensor> of_weights, of_biases;
  at::Tensor grad = grad_output;
  for (size_t i = layers; i-- > 0 && wanted.reaches(i);) {
    const auto layer_output = i + 1 == layers ? output : inputs.get(i + 1);
    const std::array<bool, 3> mask = {wanted.passes(i), wanted.weight(i), wanted.bias(i)};
    auto [of_input, of_weight, of_bias] =
        layer(grad, inputs.get(i), weights.get(i),
              relu.get(i) ? layer_output.value() : at::Tensor(), mask);
    if (mask[1]) of_weights.push_back(of_weight);
    if (mask[2]) of_biases.push_back(of_bias);
    grad = of_input;
  }
  std::vector<at::Tensor> grads;
  if (wanted.input()) grads.push_back(grad);
  grads.insert(grads.end(), of_weights.rbegin(), of_weights.rend());
  grads.insert(grads.end(), of_biases.rbegin(), of_biases.rend());
  return grads;
}

// ---- layer by layer, for every device that has linear's operators ----

at::Tensor layer_output(const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, bool relu) {
  return relu ? linear_relu(input, weight, bias) : fastnn::linear(input, weight, bias);
}

at::Tensor mlp_by_layers(const at::Tensor& input, at::TensorList weights,
                         const OptionalTensors& biases, const Flags& relu) {
  check_mlp_lists(weights, biases, relu);
  at::Tensor output = input;
  for (size_t i = 0; i < weights.size(); ++i) {
    output = layer_output(output, weights[i], biases.get(i), relu.get(i));
  }
  return output;
}

std::vector<at::Tensor> mlp_forward_by_layers(const at::Tensor& input, at::TensorList weights,
                                              const OptionalTensors& biases, const Flags& relu) {
  check_mlp(input, weights, biases, relu);
  std::vector<at::Tensor> outputs;
  for (size_t i = 0; i < weights.size(); ++i) {
    outputs.push_back(
        layer_output(i == 0 ? input : outputs.back(), weights[i], biases.get(i), relu.get(i)));
  }
  return outputs;
}

std::vector<at::Tensor> mlp_backward_by_layers(const at::Tensor& grad_output,
                                               const OptionalTensors& inputs,
                                               const OptionalTensors& weights,
                                               const std::optional<at::Tensor>& output,
                                               const Flags& relu, const Flags& output_mask) {
  check_mlp_backward(grad_output, inputs, weights, output, relu, output_mask);
  return backward_by_layers(
      grad_output, inputs, weights, output, relu, output_mask,
      [](const at::Tensor& grad, const std::optional<at::Tensor>& input,
         const std::optional<at::Tensor>& weight, const at::Tensor& relu_output,
         std::array<bool, 3> mask) {
        return relu_output.defined() ? linear_relu_backward(grad, input, weight, relu_output, mask)
                                     : linear_backward(grad, input, weight, mask);
      });
}

}  // namespace

std::vector<at::Tensor> mlp_backward_composite(const at::Tensor& grad_output,
                                               const OptionalTensors& inputs,
                                               const OptionalTensors& weights,
                                               const std::optional<at::Tensor>& output,
                                               const Flags& relu, const Flags& output_mask) {
  return backward_by_layers(grad_output, inputs, weights, output, relu, output_mask,
                            linear_relu_backward_composite);
}

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("mlp(Tensor input, Tensor[] weights, Tensor?[] biases, bool[] relu) -> Tensor");
  m.def("mlp_forward(Tensor input, Tensor[] weights, Tensor?[] biases, bool[] relu) -> Tensor[]");
  m.def(
      "mlp_backward(Tensor grad_output, Tensor?[] inputs, Tensor?[] weights, Tensor? output, "
      "bool[] relu, bool[] output_mask) -> Tensor[]");
}

// The fallback if no kernel is registered for the device or layout.
TORCH_LIBRARY_IMPL(fastnn, CompositeExplicitAutograd, m) {
  m.impl("mlp", mlp_by_layers);
  m.impl("mlp_forward", mlp_forward_by_layers);
  m.impl("mlp_backward", mlp_backward_by_layers);
}
TORCH_LIBRARY_IMPL(fastnn, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("mlp", mlp_composite);
}

}  // namespace fastnn
