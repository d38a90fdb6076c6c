// When an operator's autograd kernel must fall back to its ATen composite.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

namespace fastnn {

// Whether a torch.func transform (vmap, grad, jvp, …) is running.
bool in_functorch();

// Whether a tensor carries a forward-mode tangent.
bool has_tangent(const at::Tensor& tensor);
inline bool has_tangent(const std::optional<at::Tensor>& tensor) {
  return tensor && has_tangent(*tensor);
}

// Whether the backward of a fused operator must be differentiable itself (create_graph=True, or a
// gradient with a tangent), or is being transformed (is_grads_batched=True).
bool backward_must_be_composite(const at::Tensor& grad_output);

// A fused backward is called below autograd, which has no kernel for it: the fallback would box
// every argument, which costs as much as a small backward.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

// Whether autograd records the operators that use this tensor.
bool needs_grad(const at::Tensor& tensor);
inline bool needs_grad(const std::optional<at::Tensor>& tensor) {
  return tensor && needs_grad(*tensor);
}

}  // namespace fastnn
