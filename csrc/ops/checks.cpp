#include "ops/checks.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include "ops/operands.h"

namespace fastnn {

bool is_supported_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

namespace {

bool is_on_our_device(const at::Tensor& tensor) {
  static const bool has_cuda = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("fastnn::linear_relu", "")
                                   .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return tensor.is_cpu() || (has_cuda && tensor.is_cuda()) || tensor.is_meta();
}

}  // namespace

bool has_kernels(const at::Tensor& tensor) {
  return is_supported_dtype(tensor.scalar_type()) && tensor.layout() == at::kStrided &&
         !tensor.is_nested() && is_on_our_device(tensor);
}

void check_same_dtype(std::string_view op, const at::Tensor& like, std::string_view name,
                      const at::Tensor& other, std::string_view like_name) {
  TORCH_CHECK(other.scalar_type() == like.scalar_type(), op, ": expected ", name, " to have ",
              like_name, "'s dtype ", like.scalar_type(), ", but got ", other.scalar_type());
}

bool is_on_device_of(const at::Tensor& like, const std::optional<at::Tensor>& other) {
  return !other || other->device() == like.device();
}

void check_same_device(std::string_view op, const at::Tensor& like, std::string_view name,
                       const at::Tensor& other, std::string_view like_name) {
  TORCH_CHECK(other.device() == like.device(), op, ": expected ", name, " to be on ", like_name,
              "'s device ", like.device(), ", but it is on ", other.device());
}

void check_sizes(std::string_view op, std::string_view name, const at::Tensor& tensor,
                 at::IntArrayRef expected) {
  TORCH_CHECK(tensor.sizes() == expected, op, ": expected ", name, " to have shape ", expected,
              ", but got ", tensor.sizes());
}

at::DimVector per_row_sizes(const at::Tensor& input) {
  at::DimVector sizes(input.sizes());
  sizes.erase(sizes.begin() + class_dim(input));
  return sizes;
}

void check_loss_devices(std::string_view op, const at::Tensor& input, const at::Tensor& target,
                        const std::optional<at::Tensor>& weight) {
  check_same_device(op, input, "target", target);
  if (weight) check_same_device(op, input, "weight", *weight);
}

bool has_dtype_for(const at::Tensor& input, const LossOptions& options) {
  const at::ScalarType dtype = options.dtype_of_loss(input);
  return dtype == input.scalar_type() || dtype == accumulate_dtype(input);
}

void check_dtype_of_loss(std::string_view op, const at::Tensor& input, const LossOptions& options) {
  TORCH_CHECK(has_dtype_for(input, options), op, ": expected the loss to have input's dtype ",
              input.scalar_type(), ", or ", accumulate_dtype(input), ", but got ",
              options.dtype_of_loss(input));
}

void check_class_weight(std::string_view op, const at::Tensor& input, const LossOptions& options) {
  const auto& weight = options.weight;
  if (!weight) return;
  check_same_device(op, input, "weight", *weight);
  const int64_t classes = input.size(class_dim(input));
  TORCH_CHECK(weight->dim() == 1 && weight->numel() == classes, op,
              ": weight tensor should be defined either for all ", classes,
              " classes or no classes but got weight tensor of shape: ", weight->sizes());
  const at::ScalarType dtype = options.dtype_of_loss(input);
  TORCH_CHECK(weight->scalar_type() == dtype, op, ": expected weight to have ",
              dtype == input.scalar_type() ? "input" : "the loss", "'s dtype ", dtype, ", but got ",
              weight->scalar_type());
}

void check_class_indices(std::string_view op, const at::Tensor& input, const at::Tensor& target,
                         const LossOptions& options) {
  check_same_device(op, input, "target", target);
  TORCH_CHECK(target.scalar_type() == at::kLong || target.scalar_type() == at::kByte, op,
              ": expected target dtype to be Long or Byte, but got ", target.scalar_type());
  const at::DimVector expected = per_row_sizes(input);
  if (input.dim() == 1) {
    TORCH_CHECK_VALUE(target.dim() == 0 || (target.dim() == 1 && target.size(0) == 1), op,
                      ": Expected target size [], got ", target.sizes());
  } else {
    const int64_t batch = target.dim() == 0 ? 0 : target.size(0);
    TORCH_CHECK_VALUE(target.dim() > 0 && batch == input.size(0), op,
                      ": Expected input batch_size (", input.size(0),
                      ") to match target batch_size (", batch, ").");
    TORCH_CHECK(target.sizes() == at::IntArrayRef(expected), op, ": Expected target size ",
                at::IntArrayRef(expected), ", got ", target.sizes());
  }
  check_class_weight(op, input, options);
}

void check_grad_dtype(std::string_view op, const at::Tensor& grad_output, const at::Tensor& input,
                      const LossOptions& options) {
  const bool fits = grad_output.scalar_type() == options.dtype_of_loss(input);
  TORCH_CHECK(fits && has_dtype_for(input, options), op,
              ": expected grad_output to have input's dtype ", input.scalar_type(), ", but got ",
              grad_output.scalar_type());
}

void check_loss_backward(std::string_view op, const at::Tensor& grad_output,
                         const at::Tensor& input, const at::Tensor& total_weight,
                         const LossOptions& options) {
  check_same_device(op, input, "grad_output", grad_output);
  check_same_device(op, input, "total_weight", total_weight);
  check_sizes(op, "grad_output", grad_output,
              options.per_row() ? per_row_sizes(input) : at::DimVector{});
  TORCH_CHECK(total_weight.dim() == 0 && total_weight.scalar_type() == accumulate_dtype(input), op,
              ": expected total_weight to be the 0-d ", accumulate_dtype(input),
              " tensor that the forward returned, but got ", total_weight.scalar_type(),
              " of shape ", total_weight.sizes());
}

at::Tensor as_long(const at::Tensor& target) {
  return target.scalar_type() == at::kByte ? target.to(at::kLong) : target;
}

void raise_bad_target(int64_t target, int64_t classes, int64_t ignore_index) {
  TORCH_CHECK_INDEX(false, "Target ", target, " is out of bounds: input has ", classes,
                    " classes, so a target must be in [0, ", classes, ") or equal ignore_index (",
                    ignore_index, ").");
}

}  // namespace fastnn
