// The Python module fastnn._C. Importing it registers the operators; it holds what Python asks of
// the build.
#include <pybind11/pybind11.h>

#include "cpu/capability.h"

PYBIND11_MODULE(_C, m) {
  m.def("cpu_capability", &fastnn::cpu::capability,
        "The instruction set whose kernels run: 'default', 'avx2' or 'avx512'.");
}
