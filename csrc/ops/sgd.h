// sgd_step_: one step of SGD with momentum over a list of tensors, in place.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "ops/operands.h"

namespace fastnn {

// Calls through the dispatcher. `momentum_buffers` is empty where momentum is zero.
void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               double lr, double momentum, double dampening, double weight_decay, bool nesterov,
               bool maximize, bool is_first_step, const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf);

// The same with a learning rate of one element that is read where it lies: on a GPU nobody has to
// wait for it, and a CUDA graph reads it anew at each replay.
void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               const at::Tensor& lr, double momentum, double dampening, double weight_decay,
               bool nesterov, bool maximize, bool is_first_step,
               const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf);

// Whether the operator takes a parameter, and with it this gradient or momentum buffer; any strides
// do.
bool sgd_takes(const at::Tensor& param);
bool sgd_takes_grad(const at::Tensor& param, const at::Tensor& grad);
bool sgd_takes_buffer(const at::Tensor& param, const at::Tensor& buffer);

// Whether a parameter's momentum buffer may be of this dtype: the parameter's own, or that which it
// is computed in.
bool is_buffer_dtype(at::ScalarType dtype, const at::Tensor& param);

// What the launchers of all devices share.

// One parameter's tensors, each as one run of memory in the parameter's order.
struct SGDItem {
  at::Tensor param;
  at::Tensor grad;
  at::Tensor buffer;  // undefined without momentum; its dtype may be another, see above
};

// The gradient's memory. Where it is only read it may be shared, copy-on-write, and stays so.
template <typename T>
T* grad_data(const at::Tensor& grad, bool is_written) {
  return is_written ? data<T>(grad) : const_cast<T*>(const_data<T>(grad));
}

// Raises unless every list fits `params`. `momentum_buffers` is empty where momentum is zero; the
// gradients are written to where they are scaled.
void check_sgd_lists(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                     double momentum, bool writes_grads);

// Raises unless `scalar`, the argument `name`, is missing or has one element.
void check_sgd_scalar(const char* name, const std::optional<at::Tensor>& scalar);

// Parameter i's tensors: themselves where they lie as one run in one order, else copies.
SGDItem sgd_item(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 size_t i);

// What was stepped in copies, back into the lists' tensors.
void copy_back(const SGDItem& item, at::TensorList params, at::TensorList grads,
               at::TensorList momentum_buffers, size_t i, bool grads_changed);

// Whether two tensors share memory: a parameter listed twice, or two views of one tensor.
bool any_share_memory(at::TensorList params, at::TensorList momentum_buffers);

// Calls step(first, last) for all parameters at once; or, where some share memory, for one after
// the other, as torch steps them: each sees what the one before has written.
template <typename F>
void step_in_order(at::TensorList params, at::TensorList momentum_buffers, F step) {
  if (!any_share_memory(params, momentum_buffers)) {
    step(size_t{0}, params.size());
    return;
  }
  for (size_t i = 0; i < params.size(); ++i) step(i, i + 1);
}

}  // namespace fastnn
