// sgd_step_ writes in place: it bumps the version counters, so that a backward through a parameter
// that has been stepped since raises instead of giving a wrong gradient.
#include "ops/sgd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

namespace fastnn {
namespace {

void bump_versions(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.is_inference()) torch::autograd::impl::bump_version(tensor);
  }
}

void bump_versions(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                   const std::optional<at::Tensor>& grad_scale) {
  bump_versions(params);
  bump_versions(momentum_buffers);
  if (grad_scale) bump_versions(grads);
}

template <typename LR>
void sgd_step_inplace(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                      LR lr, double momentum, double dampening, double weight_decay, bool nesterov,
                      bool maximize, bool is_first_step,
                      const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf) {
  {
    at::AutoDispatchBelowADInplaceOrView below_inplace;
    sgd_step_(params, grads, momentum_buffers, lr, momentum, dampening, weight_decay, nesterov,
              maximize, is_first_step, grad_scale, found_inf);
  }
  bump_versions(params, grads, momentum_buffers, grad_scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, ADInplaceOrView, m) {
  m.impl("sgd_step_", sgd_step_inplace<double>);
  m.impl("sgd_step_.tensor_lr", sgd_step_inplace<const at::Tensor&>);
}

}  // namespace fastnn
