#include "ops/mlp.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "autograd/backward_node.h"
#include "autograd/linear.h"
#include "autograd/transforms.h"

namespace fastnn {
namespace {

using torch::autograd::variable_list;

Flags as_flags(const std::vector<bool>& values) {
  Flags flags;
  for (const bool value : values) flags.push_back(value);
  return flags;
}

OptionalTensors optional_tensors(at::TensorList tensors) {
  OptionalTensors result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) result.push_back(optional(tensor));
  return result;
}

// The node saves the chain's output (if it ends in a ReLU), then each layer's input, then each
// layer's weight; a tensor that no gradient needs is undefined.
struct MLPBackward {
  static constexpr auto name = "MLPBackward";
  using Tensors = std::vector<at::Tensor>;
  static constexpr std::array<bool, 1> kOutputs = {true};
  using Options = std::tuple<std::vector<bool>>;

  // Gives the layers' outputs the nodes that separate layers would have given them: they are then
  // functions of the parameters, whose values may have changed since, as in torch.
  static void give_history(Tensors& saved, const at::Tensor& grad,
                           const torch::autograd::edge_list& edges, const Options& options) {
    const auto& [relu] = options;
    const size_t layers = relu.size();
    const auto input = saved.begin() + 1, weight = input + layers;
    torch::autograd::Edge input_edge = edges[0];
    for (size_t i = 0; i + 1 < layers; ++i) {
      const auto &weight_edge = edges[1 + i], &bias_edge = edges[1 + layers + i];
      if (!input_edge.is_valid() && !weight_edge.is_valid() && !bias_edge.is_valid()) continue;
      at::Tensor& output = input[i + 1];
      output = output.defined() ? output.variable_data() : no_values_like(grad, weight[i + 1]);
      give_linear_history(output, relu[i], input[i], weight[i],
                          {input_edge, weight_edge, bias_edge});
      input_edge = torch::autograd::impl::gradient_edge(output);
    }
  }

  static variable_list backward(const at::Tensor& grad, Tensors&& saved, const Options& options,
                                const std::vector<bool>& needs_input_grad) {
    const auto& [relu_flags] = options;
    const Flags relu = as_flags(relu_flags), mask = as_flags(needs_input_grad);
    const size_t layers = relu.size();
    const at::TensorList list = saved;
    const OptionalTensors inputs = optional_tensors(list.slice(1, layers));
    const OptionalTensors weights = optional_tensors(list.slice(1 + layers, layers));
    const std::vector<at::Tensor> grads = [&] {
      if (backward_must_be_composite(grad)) {
        return mlp_backward_composite(grad, inputs, weights, optional(list[0]), relu, mask);
      }
      BelowAutograd below_autograd;
      return mlp_backward(grad, inputs, weights, optional(list[0]), relu, mask);
    }();
    variable_list result(needs_input_grad.size());
    auto next = grads.begin();
    for (size_t i = 0; i < result.size(); ++i) {
      if (needs_input_grad[i]) result[i] = *next++;
    }
    return result;
  }

 private:
  // A placeholder for the input of a layer with this weight: only its node is needed.
  static at::Tensor no_values_like(const at::Tensor& grad, const at::Tensor& weight) {
    auto sizes = grad.sym_sizes().vec();
    sizes.back() = weight.sym_size(1);
    return at::empty_symint(sizes, weight.options());
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
    std::vector<at::Tensor> saved = {relu.get(layers - 1) ? outputs.back() : at::Tensor()};
    for (size_t i = 0; i < layers; ++i) {
      const bool masks = i > 0 && wanted.passes(i) && relu.get(i - 1);
      const at::Tensor& layer_input = i == 0 ? input : outputs[i - 1];
      saved.push_back(wanted.weight(i) || masks ? layer_input : at::Tensor());
    }
    for (size_t i = 0; i < layers; ++i) {
      saved.push_back(wanted.passes(i) ? weights[i] : at::Tensor());
    }
    return saved;
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

// vmap runs these on the whole batch at once; without them it would loop over the samples.
TORCH_LIBRARY_IMPL(fastnn, FuncTorchBatchedDecomposition, m) {
  m.impl("mlp", mlp_composite);
  m.impl("mlp_backward", mlp_backward_composite);
}
// is_grads_batched=True can't loop over an operator that returns a list.
TORCH_LIBRARY_IMPL(fastnn, Batched, m) {
  m.impl("mlp_backward", mlp_backward_composite);
}

}  // namespace fastnn
