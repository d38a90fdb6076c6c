#include "autograd/transforms.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace fastnn {

bool in_functorch() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(
      c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

bool has_tangent(const at::Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}

bool backward_must_be_composite(const at::Tensor& grad_output) {
  return at::GradMode::is_enabled() || in_functorch() || has_tangent(grad_output);
}

bool needs_grad(const at::Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.defined() && tensor.requires_grad();
}

}  // namespace fastnn
