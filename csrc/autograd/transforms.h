// When an operator's autograd kernel must step aside for its ATen composite.
#pragma once

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

// Whether the backward of a fused operator must be differentiable itself (create_graph=True), or
// is being transformed (is_grads_batched=True).
bool backward_must_be_composite();

// Whether autograd records anything for this tensor.
bool needs_grad(const at::Tensor& tensor);
inline bool needs_grad(const std::optional<at::Tensor>& tensor) {
  return tensor && needs_grad(*tensor);
}

}  // namespace fastnn
