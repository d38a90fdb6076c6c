#include "ops/log_softmax.h"

#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/log_softmax.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/transforms.h"

namespace fastnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LogSoftmax : torch::autograd::Function<LogSoftmax> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, int64_t dim) {
    BelowAutograd below_autograd;
    at::Tensor output = fastnn::log_softmax(input, dim);
    ctx->save_for_backward({output});
    ctx->saved_data["dim"] = dim;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const at::Tensor output = ctx->get_saved_variables()[0];
    const int64_t dim = ctx->saved_data["dim"].toInt();
    const at::Tensor& grad = grad_outputs[0];
    if (!grad.defined()) return variable_list(2);
    if (backward_must_be_composite(grad)) {
      return {at::_log_softmax_backward_data(grad, output, dim, output.scalar_type()),
              at::Tensor()};
    }
    BelowAutograd below_autograd;
    return {log_softmax_backward(grad, output, dim), at::Tensor()};
  }
};

at::Tensor log_softmax_autograd(const at::Tensor& input, int64_t dim) {
  if (in_functorch() || has_tangent(input) || !log_softmax_is_fusable(input)) {
    return at::log_softmax(input, dim);
  }
  if (needs_grad(input)) return LogSoftmax::apply(input, dim);
  BelowAutograd below_autograd;
  return fastnn::log_softmax(input, dim);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("log_softmax", log_softmax_autograd);
}

}  // namespace fastnn
