#include "ops/log_softmax.h"

#include <ATen/ops/log_softmax.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/operands.h"

namespace fastnn {

at::Tensor log_softmax(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::log_softmax", "")
                             .typed<decltype(log_softmax)>();
  return op.call(input, dim, dtype);
}

at::Tensor log_softmax_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                int64_t dim, std::optional<at::ScalarType> dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::log_softmax_backward", "")
                             .typed<decltype(log_softmax_backward)>();
  return op.call(grad_output, output, dim, dtype);
}

bool can_fuse_log_softmax(const at::Tensor& input, std::optional<at::ScalarType> dtype) {
  return has_kernels(input) &&
         (!dtype || *dtype == input.scalar_type() || *dtype == accumulate_dtype(input));
}

at::Tensor log_softmax_composite(const at::Tensor& input, int64_t dim,
                                 std::optional<at::ScalarType> dtype) {
  return at::log_softmax(input, dim, dtype);
}

void check_log_softmax_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                std::optional<at::ScalarType> dtype) {
  constexpr auto op = "log_softmax_backward";
  TORCH_CHECK(is_supported_dtype(output.scalar_type()), op, ": expected a floating-point output, ",
              "but got ", output.scalar_type());
  check_same_device(op, output, "grad_output", grad_output, "output");
  check_same_dtype(op, output, "grad_output", grad_output, "output");
  check_sizes(op, "grad_output", grad_output, output.sizes());
  if (!dtype || *dtype == output.scalar_type()) return;
  TORCH_CHECK(
      is_supported_dtype(*dtype) && output.scalar_type() == at::kFloat && *dtype != at::kDouble, op,
      ": expected the input's dtype to be that of output, ", output.scalar_type(),
      ", or one that is summed in it, but got ", *dtype);
}

Layout log_softmax_layout(const at::Tensor& tensor, int64_t dim) {
  if (tensor.dim() == 0) return {1, 1, 1};
  return layout_around(tensor.sizes(), dim);
}

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def("log_softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor");
  m.def(
      "log_softmax_backward(Tensor grad_output, Tensor output, int dim, "
      "ScalarType? dtype=None) -> Tensor");
}

// The fallback if no kernel is registered for the device or layout.
TORCH_LIBRARY_IMPL(fastnn, CompositeExplicitAutograd, m) {
  m.impl("log_softmax", log_softmax_composite);
}
TORCH_LIBRARY_IMPL(fastnn, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("log_softmax", log_softmax_composite);
}

}  // namespace fastnn
