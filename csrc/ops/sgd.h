// sgd_step_: one step of SGD with momentum over a list of tensors, in place.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastnn {

// Calls through the dispatcher. `momentum_buffers` is empty where momentum is zero.
void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               double lr, double momentum, double dampening, double weight_decay, bool nesterov,
               bool maximize, bool is_first_step, const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf);

// Whether the operator takes a parameter with this gradient or momentum buffer; any strides do.
bool sgd_takes(const at::Tensor& param);
bool sgd_takes(const at::Tensor& param, const at::Tensor& other);

}  // namespace fastnn
