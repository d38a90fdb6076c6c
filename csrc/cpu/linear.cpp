// linear and linear_relu on the CPU: a matrix product with bias and ReLU as its epilogue. The
// backward masks the gradient and sums it for the bias in one pass, then computes two products.
#include "ops/linear.h"

#include <torch/library.h>

#include "cpu/column_sums.h"
#include "cpu/gemm.h"
#include "cpu/launch.h"

namespace fastnn::cpu {
namespace {

template <bool relu>
at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias) {
  if (!can_fuse_linear(input, weight, bias)) return linear_composite<relu>(input, weight, bias);
  check_linear(relu, input, weight);
  const at::Tensor output = cpu::matmul(matrix_of_rows(input), weight.t(), bias, relu);
  return input.dim() == 2 ? output : output.view(with_last_size(input, weight.size(0)));
}

// The gradient of the bias.
at::Tensor sums_of_columns(const at::Tensor& grad) {
  const at::Tensor sums = empty_result({grad.size(1)}, grad.scalar_type());
  dispatch(grad.scalar_type(), "linear_backward", [&]<typename T>() {
    column_sums(data<T>(sums), const_data<T>(grad), grad.size(0), grad.size(1));
  });
  return sums;
}

struct MaskedGradient {
  at::Tensor grad_linear;
  at::Tensor grad_bias;
};

// grad_output where the output is positive, and its sum over rows if that is wanted.
MaskedGradient masked_gradient(const at::Tensor& grad, const at::Tensor& output, bool wants_bias) {
  const at::ScalarType dtype = grad.scalar_type();
  MaskedGradient result{empty_result(grad.sizes(), dtype), {}};
  if (wants_bias) result.grad_bias = empty_result({grad.size(1)}, dtype);
  dispatch(dtype, "linear_relu_backward", [&]<typename T>() {
    relu_backward(data<T>(result.grad_linear), wants_bias ? data<T>(result.grad_bias) : nullptr,
                  const_data<T>(grad), const_data<T>(output), grad.size(0), grad.size(1));
  });
  return result;
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return cpu::matmul(a, b);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_cpu(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, std::array<bool, 3> output_mask) {
  check_linear_backward(grad_output, input, weight, /*output=*/nullptr, output_mask);
  const at::Tensor grad = matrix_of_rows(grad_output).contiguous();
  const at::Tensor grad_bias = output_mask[2] ? sums_of_columns(grad) : at::Tensor();
  const auto [grad_input, grad_weight] =
      factor_gradients(grad, grad_output, input, weight, output_mask, product);
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward_cpu(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask) {
  check_linear_backward(grad_output, input, weight, &output, output_mask);
  const auto [grad_linear, grad_bias] =
      masked_gradient(matrix_of_rows(grad_output).contiguous(), matrix_of_rows(output).contiguous(),
                      output_mask[2]);
  const auto [grad_input, grad_weight] =
      factor_gradients(grad_linear, grad_output, input, weight, output_mask, product);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("linear", linear_cpu<false>);
  m.impl("linear_backward", linear_backward_cpu);
  m.impl("linear_relu", linear_cpu<true>);
  m.impl("linear_relu_backward", linear_relu_backward_cpu);
}

}  // namespace fastnn::cpu
