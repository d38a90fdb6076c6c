#include "ops/log_softmax.h"

#include <ATen/ops/log_softmax.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/operands.h"

namespace fastnn {

at::Tensor log_softmax(const at::Tensor& input, int64_t dim) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::log_softmax", "")
                             .typed<decltype(log_softmax)>();
  return op.call(input, dim);
}

at::Tensor log_softmax_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                int64_t dim) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::log_softmax_backward", "")
                             .typed<decltype(log_softmax_backward)>();
  return op.call(grad_output, output, dim);
}

bool can_fuse_log_softmax(const at::Tensor& input) {
  return has_kernels(input);
}

at::Tensor log_softmax_composite(const at::Tensor& input, int64_t dim) {
  return at::log_softmax(input, dim);
}

void check_log_softmax_backward(const at::Tensor& grad_output, const at::Tensor& output) {
  constexpr auto op = "log_softmax_backward";
  TORCH_CHECK(is_supported_dtype(output.scalar_type()), op, ": expected a floating-point output, ",
              "but got ", output.scalar_type());
  check_same_device(op, output, "grad_output", grad_output, "output");
  check_same_dtype(op, output, "grad_output", grad_output, "output");
  check_sizes(op, "grad_output", grad_output, output.sizes());
}

Layout log_softmax_layout(const at::Tensor& tensor, int64_t dim) {
  if (tensor.dim() == 0) return {1, 1, 1};
  return layout_around(tensor.sizes(), dim);
}

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("log_softmax(Tensor input, int dim) -> Tensor");
  m.def("log_softmax_backward(Tensor grad_output, Tensor output, int dim) -> Tensor");
}

// The fallback if no kernel is registered for the device or layout.
TORCH_LIBRARY_IMPL(fastnn, CompositeExplicitAutograd, m) {
  m.impl("log_softmax", log_softmax_composite);
}
TORCH_LIBRARY_IMPL(fastnn, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("log_softmax", log_softmax_composite);
}

}  // namespace fastnn
