// mlp(input, weights, biases, relu): linear layers in a row, with a ReLU behind those for which
// `relu` says so; and its backward.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace fastnn {

// Lists as the dispatcher has them. Each has an element for each layer.
using OptionalTensors = c10::List<std::optional<at::Tensor>>;
using Flags = c10::List<bool>;

// Calls through the dispatcher.
at::Tensor mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
               const Flags& relu);
// The outputs of all layers.
std::vector<at::Tensor> mlp_forward(const at::Tensor& input, at::TensorList weights,
                                    const OptionalTensors& biases, const Flags& relu);
// `output_mask` says which gradients are wanted, and so are returned: of the input, of each weight,
// of each bias. `inputs` holds each layer's input, for the gradient of its weight and the mask of
// the ReLU before it, and `weights` what brings the gradient to the layers before. `output` is what
// the ReLU behind the last layer made. What no wanted gradient takes may be missing.
std::vector<at::Tensor> mlp_backward(const at::Tensor& grad_output, const OptionalTensors& inputs,
                                     const OptionalTensors& weights,
                                     const std::optional<at::Tensor>& output, const Flags& relu,
                                     const Flags& output_mask);

// The same in ATen operators, with torch's own transforms and derivatives of any order.
at::Tensor mlp_composite(const at::Tensor& input, at::TensorList weights,
                         const OptionalTensors& biases, const Flags& relu);
std::vector<at::Tensor> mlp_backward_composite(const at::Tensor& grad_output,
                                               const OptionalTensors& inputs,
                                               const OptionalTensors& weights,
                                               const std::optional<at::Tensor>& output,
                                               const Flags& relu, const Flags& output_mask);

// Whether the fused kernels take these arguments.
bool can_fuse_mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases);

// Raises unless there is a layer, and each list has one element for each.
void check_mlp_lists(at::TensorList weights, const OptionalTensors& biases, const Flags& relu);

// What the launchers of all devices share.

// Raises unless the layers fit each other and the input.
void check_mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
               const Flags& relu);

// Raises unless the backward has what the wanted gradients take, and all of it fits grad_output.
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
  // The first layer with a wanted gradient, 0 where the input's is.
  size_t first() const {
    return first_;
  }
  // Whether the gradient of a layer's output, or of its input, leads to any.
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
