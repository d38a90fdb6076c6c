#include "ops/linear.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace fastnn {

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::linear", "")
                             .typed<decltype(linear)>();
  return op.call(input, weight, bias);
}

at::Tensor linear_relu(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::linear_relu", "")
                             .typed<decltype(linear_relu)>();
  return op.call(input, weight, bias);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::linear_backward", "")
                             .typed<decltype(linear_backward)>();
  return op.call(grad_output, input, weight, output_mask);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::linear_relu_backward", "")
                             .typed<decltype(linear_relu_backward)>();
  return op.call(grad_output, input, weight, output, output_mask);
}

bool can_fuse_linear(const at::Tensor& input, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias) {
  const auto fits_input = [&](const at::Tensor& tensor) {
    return tensor.device() == input.device() && tensor.scalar_type() == input.scalar_type();
  };
  return has_kernels(input) && input.dim() >= 1 && fits_input(weight) &&
         weight.layout() == at::kStrided && weight.dim() == 2 &&
         (!bias ||
          (fits_input(*bias) && bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0)));
}

namespace {

std::string_view operator_name(bool relu) {
  return relu ? "linear_relu" : "linear";
}

// Raises if dtypes or devices differ or the bias doesn't fit the weight. Other unusual arguments
// (integers, a broadcast bias, a 1-D weight) are left to torch.
void check_linear_types(bool relu, const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias) {
  const std::string_view op = operator_name(relu);
  check_same_device(op, input, "weight", weight);
  check_same_dtype(op, input, "weight", weight);
  if (!bias) return;
  check_same_device(op, input, "bias", *bias);
  check_same_dtype(op, input, "bias", *bias);
  // Torch broadcasts a bias of one element or of several dimensions.
  TORCH_CHECK(weight.dim() != 2 || bias->dim() != 1 || bias->sym_size(0) == 1 ||
                  bias->sym_size(0) == weight.sym_size(0),
              op, ": expected bias to have shape [", weight.sym_size(0), "], but got ",
              bias->sym_sizes());
}

}  // namespace

template <bool relu>
at::Tensor linear_composite(const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
  check_linear_types(relu, input, weight, bias);
  const at::Tensor output = at::linear(input, weight, bias);
  return relu ? at::relu(output) : output;
}
template at::Tensor linear_composite<false>(const at::Tensor&, const at::Tensor&,
                                            const std::optional<at::Tensor>&);
template at::Tensor linear_composite<true>(const at::Tensor&, const at::Tensor&,
                                           const std::optional<at::Tensor>&);

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_relu_backward_composite(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, const at::Tensor& output,
    std::array<bool, 3> output_mask) {
  const at::Tensor grad_linear =
      output.defined() ? at::threshold_backward(grad_output, output, 0) : grad_output;
  const at::Tensor rows = matrix_of_rows(grad_linear);
  at::Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) grad_input = grad_linear.matmul(*weight);
  if (output_mask[1]) grad_weight = rows.t().matmul(matrix_of_rows(*input));
  if (output_mask[2]) grad_bias = rows.sum(0);
  return {grad_input, grad_weight, grad_bias};
}

void check_linear(bool relu, const at::Tensor& input, const at::Tensor& weight) {
  TORCH_CHECK(input.size(-1) == weight.size(1), operator_name(relu),
              ": expected input's last dimension to have weight's in_features ", weight.size(1),
              ", but input has shape ", input.sizes(), " and weight ", weight.sizes());
}

void check_linear_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
                           const std::optional<at::Tensor>& weight, const at::Tensor* output,
                           std::array<bool, 3> output_mask) {
  const bool relu = output != nullptr;
  const std::string_view op = relu ? "linear_relu_backward" : "linear_backward";
  const std::string_view like_name = relu ? "output" : "grad_output";
  const at::Tensor& like = relu ? *output : grad_output;
  TORCH_CHECK(weight || !output_mask[0], op,
              ": expected weight for the gradient of input, but got None");
  TORCH_CHECK(input || !output_mask[1], op,
              ": expected input for the gradient of weight, but got None");
  TORCH_CHECK(like.dim() >= 1, op, ": expected ", like_name,
              " of 1 or more dimensions, but got shape ", like.sizes());
  const auto check_alike = [&](std::string_view name, const at::Tensor& tensor) {
    check_same_device(op, like, name, tensor, like_name);
    check_same_dtype(op, like, name, tensor, like_name);
  };
  if (relu) {
    check_alike("grad_output", grad_output);
    check_sizes(op, "grad_output", grad_output, like.sizes());
  }
  if (input) {
    check_alike("input", *input);
    TORCH_CHECK(input->dim() >= 1, op, ": expected input of 1 or more dimensions, but got shape ",
                input->sizes());
    check_sizes(op, "input", *input, with_last_size(like, input->size(-1)));
  }
  if (weight) {
    check_alike("weight", *weight);
    TORCH_CHECK(weight->dim() == 2, op, ": expected weight of 2 dimensions, but got shape ",
                weight->sizes());
    check_sizes(op, "weight", *weight, {like.size(-1), weight->size(1)});
  }
  if (input && weight) check_linear(relu, *input, *weight);
}

at::DimVector with_last_size(const at::Tensor& tensor, int64_t size) {
  at::DimVector sizes(tensor.sizes());
  sizes.back() = size;
  return sizes;
}

at::Tensor matrix_of_rows(const at::Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  // The sizes are explicit because reshape({-1, 0}) is ambiguous.
  c10::SymInt rows = 1;
  for (const auto& size : tensor.sym_sizes().slice(0, tensor.dim() - 1)) rows *= size;
  return tensor.reshape_symint({rows, tensor.sym_size(-1)});
}

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool[3] output_mask) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "linear_relu_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor output, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

// The fallback if no kernel is registered for the device or layout.
TORCH_LIBRARY_IMPL(fastnn, CompositeExplicitAutograd, m) {
  m.impl("linear", linear_composite<false>);
  m.impl("linear_relu", linear_composite<true>);
}
TORCH_LIBRARY_IMPL(fastnn, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("linear", linear_composite<false>);
  m.impl("linear_relu", linear_composite<true>);
}

}  // namespace fastnn
