// The Python module fastnn._C. Importing it registers the operators; its functions describe the
// build or are calls for which the dispatcher is too slow.
#include "cpu/capability.h"
#include "python/functional.h"
#include "python/mlp_step.h"
#include "python/optimizer_state.h"
#include "python/sgd.h"

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.def("cpu_capability", &fastnn::cpu::capability,
        "The instruction set whose kernels run: 'default', 'avx2' or 'avx512'.");
  fastnn::python::define_functional(m);
  m.def("sgd_step_group", &fastnn::python::sgd_step_group, py::arg("params"), py::arg("state"),
        py::arg("group"), py::kw_only(), py::arg("lr"), py::arg("grad_scale"), py::arg("found_inf"),
        py::arg("float32_momentum"), py::arg("all_or_nothing"),
        "Steps the parameters of a group; returns those left for torch's own path.");
  fastnn::python::define_mlp_step(m);
  m.def("clear_gradients", &fastnn::python::clear_gradients, py::arg("params"),
        "Sets the parameters' gradients to None.");
}
