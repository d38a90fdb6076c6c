// linear_relu on the CPU: a matrix product with bias and ReLU as its epilogue; the backward makes
// mask and bias gradient in one pass, then the two products.
#include "ops/linear_relu.h"

#include <torch/library.h>

#include "cpu/gemm.h"
#include "cpu/launch.h"
#include "ops/checks.h"

namespace fastnn::cpu {
namespace {

// Sizes are given, not inferred: reshape({-1, 0}) is ambiguous.
at::Tensor as_rows(const at::Tensor& tensor, int64_t cols) {
  if (tensor.dim() == 2) return tensor;
  const int64_t rows = tensor.sizes().slice(0, tensor.dim() - 1).empty()
                           ? 1
                           : c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  return tensor.reshape({rows, cols});
}

void check_shapes(const at::Tensor& input, const at::Tensor& weight) {
  TORCH_CHECK(input.size(-1) == weight.size(1), "linear_relu: expected input's last dimension to ",
              "have weight's in_features ", weight.size(1), ", but input has shape ", input.sizes(),
              " and weight ", weight.sizes());
}

at::Tensor linear_relu_cpu(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias) {
  if (!linear_relu_is_fusable(input, weight, bias)) {
    return linear_relu_composite(input, weight, bias);
  }
  check_shapes(input, weight);
  const at::Tensor rows = as_rows(input, weight.size(1));
  const at::Tensor output = matmul_bias_relu(rows, weight.t(), bias);

  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  return input.dim() == 2 ? output : output.view(sizes);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& output, std::array<bool, 3> output_mask) {
  constexpr auto op = "linear_relu_backward";
  TORCH_CHECK(input.dim() >= 1 && weight.dim() == 2, op, ": expected input of 1 or more and ",
              "weight of 2 dimensions, but got shapes ", input.sizes(), " and ", weight.sizes());
  check_same_dtype(op, input, "weight", weight);
  check_shapes(input, weight);
  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  for (const auto& [name, tensor] : {std::pair("grad_output", grad_output), {"output", output}}) {
    check_same_device(op, input, name, tensor);
    check_same_dtype(op, input, name, tensor);
    check_sizes(op, name, tensor, sizes);
  }

  const int64_t cols = weight.size(0);
  const at::Tensor grad = as_rows(grad_output, cols).contiguous();
  const at::Tensor out = as_rows(output, cols).contiguous();
  const at::Tensor grad_linear = empty(grad.sizes(), grad.scalar_type());
  at::Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[2]) grad_bias = empty({cols}, weight.scalar_type());

  dispatch(input.scalar_type(), op, [&]<typename T>() {
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

  if (output_mask[0]) grad_input = matmul(grad_linear, weight);
  if (output_mask[1]) grad_weight = matmul(grad_linear.t(), as_rows(input, weight.size(1)));
  if (output_mask[0] && input.dim() != 2) grad_input = grad_input.view(input.sizes());
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("linear_relu", linear_relu_cpu);
  m.impl("linear_relu_backward", linear_relu_backward_cpu);
}

}  // namespace fastnn::cpu
