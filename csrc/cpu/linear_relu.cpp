// linear_relu on the CPU: a matrix product with bias and ReLU as its epilogue; the backward makes
// mask and bias gradient in one pass, then the two products.
#include "ops/linear_relu.h"

#include <torch/library.h>

#include "cpu/gemm.h"
#include "cpu/launch.h"

namespace fastnn::cpu {
namespace {

at::Tensor linear_relu_cpu(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias) {
  if (!can_fuse_linear_relu(input, weight, bias)) {
    return linear_relu_composite(input, weight, bias);
  }
  check_linear_relu(input, weight);
  const at::Tensor output = matmul_bias_relu(matrix_of_rows(input), weight.t(), bias);
  return input.dim() == 2 ? output : output.view(with_last_size(input, weight.size(0)));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward_cpu(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask) {
  check_linear_relu_backward(grad_output, input, weight, output, output_mask);
  const at::Tensor grad = matrix_of_rows(grad_output).contiguous();
  const at::Tensor out = matrix_of_rows(output).contiguous();
  const int64_t cols = grad.size(1);
  const at::Tensor grad_linear = empty_result(grad.sizes(), grad.scalar_type());
  at::Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[2]) grad_bias = empty_result({cols}, grad.scalar_type());

  dispatch(grad.scalar_type(), "linear_relu_backward", [&]<typename T>() {
    const auto& kernel = kernels<T>();
    const int64_t rows = grad.size(0);
    T* grad_linear_data = data<T>(grad_linear);
    T* grad_bias_data = output_mask[2] ? data<T>(grad_bias) : nullptr;
    const T* grad_data = const_data<T>(grad);
    const T* out_data = const_data<T>(out);
    // Split by columns, so that each bias gradient is one thread's sum in a fixed order; 64 at
    // least, so that no two threads write to one cache line.
    const int64_t columns = std::max<int64_t>(64, grain(rows));
    at::parallel_for(0, cols, columns, [&](int64_t begin, int64_t end) {
      kernel.relu_backward(grad_linear_data, grad_bias_data, grad_data, out_data, rows, cols, begin,
                           end);
    });
  });

  if (output_mask[0]) {
    grad_input = cpu::matmul(grad_linear, *weight);
    if (output.dim() != 2) grad_input = grad_input.view(with_last_size(output, weight->size(1)));
  }
  if (output_mask[1]) grad_weight = cpu::matmul(grad_linear.t(), matrix_of_rows(*input));
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("linear_relu", linear_relu_cpu);
  m.impl("linear_relu_backward", linear_relu_backward_cpu);
}

}  // namespace fastnn::cpu
