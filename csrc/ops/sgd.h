// sgd_step_: one step of SGD with momentum over a list of tensors, in place.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops/sgd_options.h"
#include "ops/tensor_lists.h"

namespace fastnn {

// The numbers of a step that are one-element tensors; each may be missing. A GPU reads them from
// its own memory: nothing waits for them, and a CUDA graph reads them anew at each replay.
struct SGDScalars {
  std::optional<at::Tensor> lr;          // in place of the options'
  std::optional<at::Tensor> grad_scale;  // gradients are divided by it, and written back
  std::optional<at::Tensor> found_inf;   // if it isn't zero, the step is skipped
};

// The lists of a step; without momentum the buffers are ignored.
inline TensorLists sgd_lists(at::TensorList params, at::TensorList grads,
                             at::TensorList momentum_buffers, const SGDOptions& options,
                             const SGDScalars& scalars) {
  TensorLists lists{params, grads, {}, scalars.grad_scale.has_value()};
  if (options.momentum != 0) lists.states.push_back({"momentum_buffers", momentum_buffers});
  return lists;
}

// Calls through the dispatcher.
void sgd_step_(const TensorLists& lists, const SGDOptions& options, const SGDScalars& scalars);

// The checks of the kernels' launchers.
void check_sgd(const TensorLists& lists, const SGDScalars& scalars);

// ---- the schema's boundary: turns `f`, which takes a struct of options, into a kernel ----

// The two overloads of sgd_step_, with a learning rate of double or of const at::Tensor&.
template <auto f, typename LR>
void as_sgd_step(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 LR lr, double momentum, double dampening, double weight_decay, bool nesterov,
                 bool maximize, bool is_first_step, const std::optional<at::Tensor>& grad_scale,
                 const std::optional<at::Tensor>& found_inf) {
  SGDOptions options{0, momentum, dampening, weight_decay, nesterov, maximize, is_first_step};
  SGDScalars scalars{std::nullopt, grad_scale, found_inf};
  if constexpr (std::is_same_v<LR, double>) {
    options.lr = lr;
  } else {
    scalars.lr = lr;
  }
  f(sgd_lists(params, grads, momentum_buffers, options, scalars), options, scalars);
}

}  // namespace fastnn
