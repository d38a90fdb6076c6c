#include "ops/sgd.h"

#include <torch/library.h>

#include "ops/checks.h"

namespace fastnn {

void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               double lr, double momentum, double dampening, double weight_decay, bool nesterov,
               bool maximize, bool is_first_step, const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::sgd_step_", "")
                             .typed<decltype(sgd_step_)>();
  op.call(params, grads, momentum_buffers, lr, momentum, dampening, weight_decay, nesterov,
          maximize, is_first_step, grad_scale, found_inf);
}

bool sgd_takes(const at::Tensor& param) {
  // A subclass may keep its data elsewhere, or want to see torch's own operators.
  return is_supported_dtype(param.scalar_type()) && param.layout() == at::kStrided &&
         param.is_cpu() && !param.unsafeGetTensorImpl()->is_python_dispatch();
}

bool sgd_takes(const at::Tensor& param, const at::Tensor& other) {
  return sgd_takes(other) && other.scalar_type() == param.scalar_type() &&
         other.sym_sizes() == param.sym_sizes();
}

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, "
      "float lr, float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, "
      "bool maximize=False, bool is_first_step=False, Tensor? grad_scale=None, "
      "Tensor? found_inf=None) -> ()");
}

}  // namespace fastnn
