// sgd_step_ writes in place and bumps the version counters, so that a backward through a parameter
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

void sgd_step_inplace(const TensorLists& lists, const SGDOptions& options,
                      const SGDScalars& scalars) {
  {
    at::AutoDispatchBelowADInplaceOrView below_inplace;
    sgd_step_(lists, options, scalars);
  }
  bump_versions(lists.params);
  for (const StateList& state : lists.states) bump_versions(state.tensors);
  if (lists.writes_grads) bump_versions(lists.grads);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, ADInplaceOrView, m) {
  m.impl("sgd_step_", as_sgd_step<sgd_step_inplace, double>);
  m.impl("sgd_step_.tensor_lr", as_sgd_step<sgd_step_inplace, const at::Tensor&>);
}

}  // namespace fastnn
