// The operators as Python functions, for eager calls: torch.ops boxes every argument and looks the
// operator's overload up at each call, which at small sizes costs more than the work.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastnn::python {

void define_functional(pybind11::module_& m);

}  // namespace fastnn::python
