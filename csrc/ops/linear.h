// linear_relu(input, weight, bias) = relu(input @ weight.T + bias), and its backward.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace fastnn {

// Calls through the dispatcher. The backward takes `weight` for the gradient of `input`, and the
// other way round; `output_mask` says which gradients are wanted.
at::Tensor linear_relu(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias);
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask);

// Whether the fused kernels take these arguments; torch serves or refuses the rest.
bool can_fuse_linear_relu(const at::Tensor& input, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias);

// The same in ATen operators, with torch's own transforms and derivatives of any order.
at::Tensor linear_relu_composite(const at::Tensor& input, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias);

// What the launchers of all devices share.

// Raises unless input's last dimension fits weight's.
void check_linear_relu(const at::Tensor& input, const at::Tensor& weight);

// Raises unless the backward has what the wanted gradients take, and all of it fits `output`.
void check_linear_relu_backward(const at::Tensor& grad_output,
                                const std::optional<at::Tensor>& input,
                                const std::optional<at::Tensor>& weight, const at::Tensor& output,
                                std::array<bool, 3> output_mask);

// A tensor's shape with another last dimension: the output's from the input's, and back.
at::DimVector with_last_size(const at::Tensor& tensor, int64_t size);

// A tensor's leading dimensions as one: a matrix of its rows, one for a 1-D tensor.
at::Tensor matrix_of_rows(const at::Tensor& tensor);

}  // namespace fastnn
