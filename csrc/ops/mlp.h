// mlp(input, weights, biases, relu): a chain of linear layers, each followed by a ReLU where `relu`
// is set, and its backward.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace fastnn {

// Lists as the dispatcher passes them, with one element per layer.
using OptionalTensors = c10::List<std::optional<at::Tensor>>;
using Flags = c10::List<bool>;

// Calls through the dispatcher.
at::Tensor mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
               const Flags& relu);
// The outputs of all layers.
std::vector<at::Tensor> mlp_forward(const at::Tensor& input, at::TensorList weights,
                                    const OptionalTensors& biases, const Flags& relu);
// `output_mask` selects the gradients to return: of the input, of each weight, of each bias. Each
// layer's input, in `inputs`, gives its weight's gradient and the mask of the ReLU before it; its
// weight passes the gradient on to the layers before. `output` is the last layer's output, needed
// if it ends in a ReLU. Tensors that no wanted gradient needs may be missing.
std::vector<at::Tensor> mlp_backward(const at::Tensor& grad_output, const OptionalTensors& inputs,
                                     const OptionalTensors& weights,
                                     const std::optional<at::Tensor>& output, const Flags& relu,
                                     const Flags& output_mask);

// The same with ATen operators, which support torch's transforms and derivatives of any order.
at::Tensor mlp_composite(const at::Tensor& input, at::TensorList weights,
                         const OptionalTensors& biases, const Flags& relu);
std::vector<at::Tensor> mlp_backward_composite(const at::Tensor& grad_output,
                                               const OptionalTensors& inputs,
                                               const OptionalTensors& weights,
                                               const std::optional<at::Tensor>& output,
                                               const Flags& relu, const Flags& output_mask);

// Whether the fused kernels take these arguments.
bool can_fuse_mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases);

// Raises unless there is at least one layer and each list has one element per layer.
void check_mlp_lists(at::TensorList weights, const OptionalTensors& biases, const Flags& relu);

// The launchers of all devices share the following.

// Raises unless the layers match each other and the input.
void check_mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
               const Flags& relu);

// Raises unless the tensors that the wanted gradients need are present and match grad_output.
void check_mlp_backward(const at::Tensor& grad_output, const OptionalTensors& inputs,
                        const OptionalTensors& weights, const std::optional<at::Tensor>& output,
                        const Flags& relu, const Flags& output_mask);

// Which gradients of a chain are wanted.
class WantedGradients {
 public:
  explicit WantedGradients(const Flags& output_mask);

  bool input() const {
    return wanted_[0];
  }
  bool weight(size_t layer) const {
    return wanted_[1 + layer];
  }
  bool bias(size_t layer) const {
    return wanted_[1 + layers_ + layer];
  }
  // The first layer with a wanted gradient; 0 if the input's is wanted.
  size_t first() const {
    return first_;
  }
  // Whether a wanted gradient needs that of the layer's output, or that of its input.
  bool reaches(size_t layer) const {
    return layer >= first_;
  }
  bool passes(size_t layer) const {
    return layer > first_ || input();
  }

 private:
  std::vector<bool> wanted_;
  size_t layers_;
  size_t first_;
};

}  // namespace fastnn
