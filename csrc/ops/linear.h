// linear(input, weight, bias) = input @ weight.T + bias, linear_relu = relu(linear), and their
// backwards. The two share everything but the ReLU.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

namespace fastnn {

// Calls through the dispatcher. The backwards need `weight` for the gradient of `input` and vice
// versa; `output_mask` selects the gradients of input, weight and bias.
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

// Whether the fused kernels take these arguments; torch handles or rejects the rest.
bool can_fuse_linear(const at::Tensor& input, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias);

// The same with ATen operators, which support torch's transforms and derivatives of any order.
template <bool relu>
at::Tensor linear_composite(const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias);

// The same for the backwards; `output` is undefined without the ReLU.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward_composite(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask);

// The launchers of all devices share the following.

// Raises unless input's last dimension matches weight's.
void check_linear(bool relu, const at::Tensor& input, const at::Tensor& weight);

// Raises unless the backward has the tensors that the wanted gradients need, and they match
// `output` or, without the ReLU (`output` is null), `grad_output`.
void check_linear_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
                           const std::optional<at::Tensor>& weight, const at::Tensor* output,
                           std::array<bool, 3> output_mask);

// A tensor's sizes with the last one replaced: turns an input's into the output's, or back.
at::DimVector with_last_size(const at::Tensor& tensor, int64_t size);

// The tensor as a matrix, its leading dimensions merged into one; a 1-D tensor becomes one row.
at::Tensor matrix_of_rows(const at::Tensor& tensor);

// The wanted gradients of input and weight, computed with the device's matmul(a, b).
// `grad_linear` is the gradient of the ReLU's input as a matrix.
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
