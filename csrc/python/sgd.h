// The optimizer's step over one parameter group, read straight from Python's objects: a list of
// tensors boxed at each call would cost more than the work.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastnn::python {

// Steps the parameters that have a gradient and that the operator takes; writes the momentum
// buffers of those whose first step it is into `state`. Returns the other parameters that have a
// gradient, untouched. With `all_or_nothing`, where there are any of these, nothing is done.
pybind11::list sgd_step_group(const pybind11::list& params, const pybind11::dict& state, double lr,
                              double momentum, double dampening, double weight_decay, bool nesterov,
                              bool maximize, bool all_or_nothing,
                              const std::optional<at::Tensor>& grad_scale);

// Sets the parameters' gradients to None.
void clear_gradients(const pybind11::list& params);

}  // namespace fastnn::python
