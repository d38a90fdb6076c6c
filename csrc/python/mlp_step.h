// Exposes MLPStep to Python, with the optimizer's options and state.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastnn::python {

void define_mlp_step(pybind11::module_& m);

}  // namespace fastnn::python
