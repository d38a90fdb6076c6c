// The step of SGD over one parameter group.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <variant>

#include "ops/sgd_options.h"

namespace fastnn::python {

// A group's options except its learning rate, which may be a tensor.
SGDOptions sgd_options(pybind11::handle group);
bool has_float32_momentum(pybind11::handle group);

// The state's key of momentum buffers, and a new buffer: of the parameter's dtype, or float32 if
// that is requested and the parameter is narrower.
pybind11::handle momentum_buffer_key();
at::Tensor new_momentum_buffer(const at::Tensor& param, bool float32);

// Steps the parameters that have a gradient and that the operator supports, with the group's
// options, and stores new momentum buffers (see new_momentum_buffer) in `state`. Returns the other
// parameters that have a gradient, untouched; with `all_or_nothing`, nothing is stepped if there
// are any. A nonzero `found_inf` skips the step; new momentum buffers are then zeros, so that
// without dampening the next step is still a first one.
pybind11::list sgd_step_group(const pybind11::list& params, const pybind11::dict& state,
                              pybind11::handle group, const std::variant<double, at::Tensor>& lr,
                              const std::optional<at::Tensor>& grad_scale,
                              const std::optional<at::Tensor>& found_inf, bool float32_momentum,
                              bool all_or_nothing);

}  // namespace fastnn::python
