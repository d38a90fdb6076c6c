#include "ops/nll_loss.h"

#include <ATen/ops/nll_loss_nd.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace fastnn {

at::Tensor nll_loss(const at::Tensor& input, const at::Tensor& target, const LossOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::nll_loss", "")
                             .typed<decltype(as_nll_loss<nll_loss>)>();
  return op.call(input, target, options.weight, options.ignore_index,
                 reduction_name(options.reduction), options.dtype);
}

std::tuple<at::Tensor, at::Tensor> nll_loss_forward(const at::Tensor& input,
                                                    const at::Tensor& target,
                                                    const LossOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::nll_loss_forward", "")
                             .typed<decltype(as_nll_loss_forward<nll_loss_forward>)>();
  return op.call(input, target, options.weight, options.ignore_index,
                 reduction_name(options.reduction), options.dtype);
}

at::Tensor nll_loss_backward(const at::Tensor& grad_output, const at::Tensor& input,
                             const at::Tensor& target, const at::Tensor& total_weight,
                             const LossOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::nll_loss_backward", "")
                             .typed<decltype(as_nll_loss_backward<nll_loss_backward>)>();
  return op.call(grad_output, input, target, options.weight, total_weight, options.ignore_index,
                 reduction_name(options.reduction));
}

bool can_fuse_nll_loss(const at::Tensor& input, const at::Tensor& target,
                       const LossOptions& options) {
  return has_kernels(input) && input.dim() >= 1 && is_on_device_of(input, target) &&
         is_on_device_of(input, options.weight) && has_dtype_for(input, options);
}

void check_nll_loss(const at::Tensor& input, const at::Tensor& target, const LossOptions& options) {
  TORCH_CHECK_VALUE(input.dim() >= 1, "nll_loss: Expected input of 1 or more dimensions (got 0)");
  check_dtype_of_loss("nll_loss", input, options);
  check_class_indices("nll_loss", input, target, options);
}

void check_nll_loss_backward(const at::Tensor& grad_output, const at::Tensor& input,
                             const at::Tensor& target, const at::Tensor& total_weight,
                             const LossOptions& options) {
  constexpr auto op = "nll_loss_backward";
  check_grad_dtype(op, grad_output, input, options);
  check_nll_loss(input, target, options);
  check_loss_backward(op, grad_output, input, total_weight, options);
}

at::Tensor nll_loss_composite(const at::Tensor& input, const at::Tensor& target,
                              const LossOptions& options) {
  check_loss_devices("nll_loss", input, target, options.weight);
  return at::nll_loss_nd(options.cast(input), as_long(target), options.cast_weight(),
                         options.reduction, options.ignore_index);
}

namespace {

at::Tensor nll_loss_default(const at::Tensor& input, const at::Tensor& target,
                            const LossOptions& options) {
  if (!can_fuse_nll_loss(input, target, options)) {
    return nll_loss_composite(input, target, options);
  }
  return std::get<0>(nll_loss_forward(input, target, options));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "nll_loss(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, "
      "str reduction='mean', ScalarType? dtype=None) -> Tensor");
  m.def(
      "nll_loss_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "str reduction, ScalarType? dtype=None) -> (Tensor loss, Tensor total_weight)");
  m.def(
      "nll_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
      "Tensor total_weight, int ignore_index, str reduction) -> Tensor");
}

// For every device; those without kernels fall back to torch.
TORCH_LIBRARY_IMPL(fastnn, CompositeExplicitAutograd, m) {
  m.impl("nll_loss", as_nll_loss<nll_loss_default>);
}
TORCH_LIBRARY_IMPL(fastnn, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("nll_loss", as_nll_loss<nll_loss_composite>);
}

}  // namespace fastnn
