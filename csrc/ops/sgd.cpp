#include "ops/sgd.h"

#include <torch/library.h>

namespace fastnn {
namespace {

template <typename LR>
void call_sgd_step(const char* overload, const TensorLists& lists, LR lr, const SGDOptions& options,
                   const SGDScalars& scalars) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::sgd_step_", overload)
                             .typed<decltype(as_sgd_step<sgd_step_, LR>)>();
  const at::TensorList buffers = lists.states.empty() ? at::TensorList() : lists.states[0].tensors;
  op.call(lists.params, lists.grads, buffers, lr, options.momentum, options.dampening,
          options.weight_decay, options.nesterov, options.maximize, options.is_first_step,
          scalars.grad_scale, scalars.found_inf);
}

}  // namespace

void sgd_step_(const TensorLists& lists, const SGDOptions& options, const SGDScalars& scalars) {
  if (scalars.lr) {
    call_sgd_step<const at::Tensor&>("tensor_lr", lists, *scalars.lr, options, scalars);
  } else {
    call_sgd_step<double>("", lists, options.lr, options, scalars);
  }
}

void check_sgd(const TensorLists& lists, const SGDScalars& scalars) {
  constexpr auto op = "sgd_step_";
  check_scalar(op, "lr", scalars.lr);
  check_tensor_lists(op, lists);
  check_scalar(op, "grad_scale", scalars.grad_scale);
  check_scalar(op, "found_inf", scalars.found_inf);
}

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, "
      "float lr, float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, "
      "bool maximize=False, bool is_first_step=False, Tensor? grad_scale=None, "
      "Tensor? found_inf=None) -> ()");
  m.def(
      "sgd_step_.tensor_lr(Tensor(a!)[] params, Tensor(b!)[] grads, "
      "Tensor(c!)[] momentum_buffers, *, Tensor lr, float momentum=0, float dampening=0, "
      "float weight_decay=0, bool nesterov=False, bool maximize=False, bool is_first_step=False, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
}

}  // namespace fastnn
