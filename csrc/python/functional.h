// The operators as Python functions, for eager calls: torch.ops boxes every argument and resolves
// the overload at each call, which costs more than the work itself at small sizes.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastnn::python {

void define_functional(pybind11::module_& m);

}  // namespace fastnn::python
