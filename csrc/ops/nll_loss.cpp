#include "ops/nll_loss.h"

#include <ATen/ops/nll_loss_nd.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace fastnn {

at::Tensor nll_loss(const at::Tensor& input, const at::Tensor& target,
                    const std::optional<at::Tensor>& weight, int64_t ignore_index,
                    std::string_view reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::nll_loss", "")
                             .typed<decltype(nll_loss)>();
  return op.call(input, target, weight, ignore_index, reduction);
}

std::tuple<at::Tensor, at::Tensor> nll_loss_forward(const at::Tensor& input,
                                                    const at::Tensor& target,
                                                    const std::optional<at::Tensor>& weight,
                                                    int64_t ignore_index,
                                                    std::string_view reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::nll_loss_forward", "")
                             .typed<decltype(nll_loss_forward)>();
  return op.call(input, target, weight, ignore_index, reduction);
}

at::Tensor nll_loss_backward(const at::Tensor& grad_output, const at::Tensor& input,
                             const at::Tensor& target, const std::optional<at::Tensor>& weight,
                             const at::Tensor& total_weight, int64_t ignore_index,
                             std::string_view reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::nll_loss_backward", "")
                             .typed<decltype(nll_loss_backward)>();
  return op.call(grad_output, input, target, weight, total_weight, ignore_index, reduction);
}

bool nll_loss_is_fusable(const at::Tensor& input, const at::Tensor& target,
                         const std::optional<at::Tensor>& weight) {
  check_same_device("nll_loss", input, "target", target);
  if (weight) check_same_device("nll_loss", input, "weight", *weight);
  return has_kernels(input) && input.dim() >= 1;
}

void check_nll_loss(const at::Tensor& input, const at::Tensor& target,
                    const std::optional<at::Tensor>& weight) {
  TORCH_CHECK_VALUE(input.dim() >= 1, "nll_loss: Expected input of 1 or more dimensions (got 0)");
  check_class_indices("nll_loss", input, target, weight);
}

at::Tensor nll_loss_composite(const at::Tensor& input, const at::Tensor& target,
                              const std::optional<at::Tensor>& weight, int64_t ignore_index,
                              std::string_view reduction) {
  return at::nll_loss_nd(input, as_long(target), weight, parse_reduction(reduction), ignore_index);
}

namespace {

at::Tensor nll_loss_default(const at::Tensor& input, const at::Tensor& target,
                            const std::optional<at::Tensor>& weight, int64_t ignore_index,
                            std::string_view reduction) {
  if (!nll_loss_is_fusable(input, target, weight)) {
    return nll_loss_composite(input, target, weight, ignore_index, reduction);
  }
  return std::get<0>(nll_loss_forward(input, target, weight, ignore_index, reduction));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "nll_loss(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, "
      "str reduction='mean') -> Tensor");
  m.def(
      "nll_loss_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "str reduction) -> (Tensor loss, Tensor total_weight)");
  m.def(
      "nll_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
      "Tensor total_weight, int ignore_index, str reduction) -> Tensor");
}

// On every device: one without kernels takes torch's way.
TORCH_LIBRARY_IMPL(fastnn, CompositeExplicitAutograd, m) {
  m.impl("nll_loss", nll_loss_default);
}
TORCH_LIBRARY_IMPL(fastnn, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("nll_loss", nll_loss_composite);
}

}  // namespace fastnn
