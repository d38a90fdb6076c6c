// linear(input, weight, bias) = input @ weight.T + bias, linear_relu its ReLU, and their backwards:
// the two differ in the ReLU alone, and share the rest.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

namespace fastnn {

// Calls through the dispatcher. The backwards take `weight` for the gradient of `input`, and the
// other way round; `output_mask` says which gradients are wanted.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias);
at::Tensor linear_relu(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias);
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, std::array<bool, 3> output_mask);
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask);

// What both share takes whether the ReLU follows, as `relu`.

// Whether the fused kernels take these arguments; torch serves or refuses the rest.
bool can_fuse_linear(const at::Tensor& input, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias);

// The same in ATen operators, with torch's own transforms and derivatives of any order.
template <bool relu>
at::Tensor linear_composite(const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias);

// Likewise the backwards; without the ReLU `output` is undefined.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward_composite(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask);

// What the launchers of all devices share.

// Raises unless input's last dimension fits weight's.
void check_linear(bool relu, const at::Tensor& input, const at::Tensor& weight);

// Raises unless the backward has what the wanted gradients take, and all of it fits `output`, which
// is null without the ReLU: all then fits `grad_output`.
void check_linear_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
                           const std::optional<at::Tensor>& weight, const at::Tensor* output,
                           std::array<bool, 3> output_mask);

// A tensor's shape with another last dimension: the output's from the input's, and back.
at::DimVector with_last_size(const at::Tensor& tensor, int64_t size);

// A tensor's leading dimensions as one: a matrix of its rows, one for a 1-D tensor.
at::Tensor matrix_of_rows(const at::Tensor& tensor);

// The wanted gradients of input and weight, by the device's matmul(a, b) of two matrices;
// `grad_linear` is the matrix of the gradient before the ReLU.
template <typename F>
std::pair<at::Tensor, at::Tensor> factor_gradients(const at::Tensor& grad_linear,
                                                   const at::Tensor& grad_output,
                                                   const std::optional<at::Tensor>& input,
                                                   const std::optional<at::Tensor>& weight,
                                                   std::array<bool, 3> output_mask, F matmul) {
  at::Tensor grad_input, grad_weight;
  if (output_mask[0]) {
    grad_input = matmul(grad_linear, *weight);
    if (grad_output.dim() != 2) {
      grad_input = grad_input.view(with_last_size(grad_output, weight->size(1)));
    }
  }
  if (output_mask[1]) grad_weight = matmul(grad_linear.t(), matrix_of_rows(*input));
  return {grad_input, grad_weight};
}

}  // namespace fastnn
