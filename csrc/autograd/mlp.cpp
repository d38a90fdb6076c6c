#include "ops/mlp.h"

#include <torch/library.h>

#include "autograd/backward_node.h"
#include "autograd/transforms.h"

namespace fastnn {
namespace {

using torch::autograd::variable_list;

Flags as_flags(const std::vector<bool>& values) {
  Flags flags;
  for (const bool value : values) flags.push_back(value);
  return flags;
}

// What the node keeps of a chain of layers: what the gradients take, and after it what makes the
// layers' outputs anew. Only a backward that is itself differentiated needs these, as functions of
// the layers before; so that parameters may be written to before any other, as in torch.
struct SavedChain {
  std::optional<at::Tensor> output;
  std::vector<at::Tensor> inputs;      // where they are needed
  std::vector<at::Tensor> weights;     // likewise
  at::Tensor first_input;              // of the first layer with a wanted gradient
  std::vector<at::Tensor> parameters;  // all weights, then all biases

  static size_t layers(size_t count) {
    return (count - 2) / 4;
  }
  std::vector<at::Tensor> as_list() const {
    std::vector<at::Tensor> list = {output.value_or(at::Tensor())};
    list.insert(list.end(), inputs.begin(), inputs.end());
    list.insert(list.end(), weights.begin(), weights.end());
    list.push_back(first_input);
    list.insert(list.end(), parameters.begin(), parameters.end());
    return list;
  }
};

OptionalTensors optional_tensors(at::TensorList tensors) {
  OptionalTensors result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) result.push_back(optional(tensor));
  return result;
}

// The chain's backward with what the layers get computed anew, from the first that has a gradient.
std::vector<at::Tensor> differentiable_backward(const at::Tensor& grad, at::TensorList saved,
                                                const Flags& relu, const Flags& mask) {
  const size_t layers = relu.size();
  const at::TensorList weights = saved.slice(2 + 2 * layers, layers);
  const at::TensorList biases = saved.slice(2 + 3 * layers, layers);
  const WantedGradients wanted(mask);
  at::Tensor output = saved[1 + 2 * layers];
  std::vector<at::Tensor> inputs(layers);
  for (size_t i = 0; i < layers; ++i) {
    if (!wanted.reaches(i)) continue;
    inputs[i] = output;
    output =
        mlp_composite(output, weights[i], optional_tensors(biases[i]), as_flags({relu.get(i)}));
  }
  return mlp_backward_composite(grad, optional_tensors(inputs), optional_tensors(weights), output,
                                relu, mask);
}

struct MLPBackward {
  static constexpr auto name = "MLPBackward";
  using Tensors = std::vector<at::Tensor>;
  static constexpr std::array<bool, 1> kOutputs = {true};
  using Options = std::tuple<std::vector<bool>>;

  static bool is_needed(size_t i, size_t count, bool composite) {
    return composite || i < 1 + 2 * SavedChain::layers(count);
  }

  static variable_list backward(const at::Tensor& grad, Tensors&& saved, const Options& options,
                                const std::vector<bool>& needs_input_grad) {
    const auto& [relu_flags] = options;
    const Flags relu = as_flags(relu_flags), mask = as_flags(needs_input_grad);
    const std::vector<at::Tensor> grads = [&] {
      const at::TensorList list = saved;
      const size_t layers = relu.size();
      if (backward_must_be_composite(grad)) {
        return differentiable_backward(grad, list, relu, mask);
      }
      BelowAutograd below_autograd;
      return mlp_backward(grad, optional_tensors(list.slice(1, layers)),
                          optional_tensors(list.slice(1 + layers, layers)), optional(list[0]), relu,
                          mask);
    }();
    variable_list result(needs_input_grad.size());
    auto next = grads.begin();
    for (size_t i = 0; i < result.size(); ++i) {
      if (needs_input_grad[i]) result[i] = *next++;
    }
    return result;
  }
};

struct Chain {
  const at::Tensor& input;
  at::TensorList weights;
  std::vector<at::Tensor> biases;  // absent ones undefined
  const Flags& relu;

  Chain(const at::Tensor& input, at::TensorList weights, const OptionalTensors& optional_biases,
        const Flags& relu)
      : input(input), weights(weights), relu(relu) {
    for (size_t i = 0; i < weights.size(); ++i) {
      biases.push_back(optional_biases.get(i).value_or(at::Tensor()));
    }
  }

  template <typename F>
  bool any(F is) const {
    return is(input) || std::any_of(weights.begin(), weights.end(), is) ||
           std::any_of(biases.begin(), biases.end(), is);
  }

  // Which of the node's gradients autograd will ask for.
  Flags needed_gradients() const {
    Flags needed;
    needed.push_back(needs_grad(input));
    for (const at::Tensor& weight : weights) needed.push_back(needs_grad(weight));
    for (const at::Tensor& bias : biases) needed.push_back(needs_grad(bias));
    return needed;
  }

  std::vector<at::Tensor> to_save(const std::vector<at::Tensor>& outputs) const {
    const size_t layers = weights.size();
    const WantedGradients wanted(needed_gradients());
    SavedChain saved;
    if (relu.get(layers - 1)) saved.output = outputs.back();
    for (size_t i = 0; i < layers; ++i) {
      const at::Tensor& layer_input = i == 0 ? input : outputs[i - 1];
      const bool masks = i > 0 && wanted.passes(i) && relu.get(i - 1);
      saved.inputs.push_back(wanted.weight(i) || masks ? layer_input : at::Tensor());
      saved.weights.push_back(wanted.passes(i) ? weights[i] : at::Tensor());
      if (wanted.reaches(i) && !saved.first_input.defined()) saved.first_input = layer_input;
    }
    saved.parameters.assign(weights.begin(), weights.end());
    saved.parameters.insert(saved.parameters.end(), biases.begin(), biases.end());
    return saved.as_list();
  }
};

at::Tensor mlp_recorded(const Chain& chain, const OptionalTensors& biases) {
  const auto node =
      make_backward_node<MLPBackward>(chain.input, chain.weights, at::TensorList(chain.biases));
  const std::vector<at::Tensor> outputs = [&] {
    BelowAutograd below_autograd;
    return mlp_forward(chain.input, chain.weights, biases, chain.relu);
  }();
  const at::Tensor output = outputs.back();
  record(node, output, chain.to_save(outputs),
         {std::vector<bool>(chain.relu.begin(), chain.relu.end())});
  return output;
}

at::Tensor mlp_autograd(const at::Tensor& input, at::TensorList weights,
                        const OptionalTensors& biases, const Flags& relu) {
  check_mlp_lists(weights, biases, relu);
  const Chain chain(input, weights, biases, relu);
  if (in_functorch() || chain.any([](const at::Tensor& t) { return has_tangent(t); }) ||
      !can_fuse_mlp(input, weights, biases)) {
    return mlp_composite(input, weights, biases, relu);
  }
  if (chain.any([](const at::Tensor& t) { return needs_grad(t); })) {
    return mlp_recorded(chain, biases);
  }
  BelowAutograd below_autograd;
  return mlp(input, weights, biases, relu);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("mlp", mlp_autograd);
}

// vmap: over the whole batch at once; without these it loops over the samples.
TORCH_LIBRARY_IMPL(fastnn, FuncTorchBatchedDecomposition, m) {
  m.impl("mlp", mlp_composite);
  m.impl("mlp_backward", mlp_backward_composite);
}

}  // namespace fastnn
