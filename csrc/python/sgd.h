// The step of SGD over one parameter group.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <variant>

#include "ops/sgd_options.h"

namespace fastnn::python {

// A group's options but for its learning rate, which may be a tensor.
SGDOptions sgd_options(pybind11::handle group);
bool has_float32_momentum(pybind11::handle group);

// What a parameter's momentum buffer is stored under, and a new one; of float32 where that is asked
// for and the parameter is narrower.
pybind11::handle momentum_buffer_key();
at::Tensor new_momentum_buffer(const at::Tensor& param, bool float32);

// Steps the parameters that have a gradient and that the operator takes, with the group's options;
// writes the momentum buffers of those whose first step it is into `state`. Returns the other
// parameters that have a gradient, untouched. With `all_or_nothing`, where there are any of these,
// nothing is done. Where `found_inf` is not zero nothing is stepped; the momentum buffers that a
// first step makes are then zeros, after which the next step is a first one, if without dampening.
// New buffers are of float32 where `float32_momentum` asks for it and the parameter is of bfloat16
// or float16, else of the parameter's dtype.
pybind11::list sgd_step_group(const pybind11::list& params, const pybind11::dict& state,
                              pybind11::handle group, const std::variant<double, at::Tensor>& lr,
                              const std::optional<at::Tensor>& grad_scale,
                              const std::optional<at::Tensor>& found_inf, bool float32_momentum,
                              bool all_or_nothing);

}  // namespace fastnn::python
