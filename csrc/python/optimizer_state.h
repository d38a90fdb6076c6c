// Reads any optimizer's state, options and gradients straight from the Python objects: boxing a
// list of tensors at each call would cost more than the step.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastnn::python {

// Reads the optimizer's state in the order of its entries. Usually that is the parameters' order,
// so comparing pointers finds each entry: hashing a tensor calls a Python function, which costs
// more than the step of a small parameter.
class StateReader {
 public:
  explicit StateReader(const pybind11::dict& state);

  // The value stored for the parameter under `key`; None if there is none yet.
  pybind11::object find(PyObject* param, pybind11::handle key);

 private:
  PyObject* find_entry(PyObject* param);
  void advance();

  PyObject* state_;
  Py_ssize_t position_ = 0;
  PyObject* key_ = nullptr;
  PyObject* entry_ = nullptr;
};

// Stores a tensor for the parameter under `key`.
void save_state(const pybind11::dict& state, PyObject* param, pybind11::handle key,
                const at::Tensor& tensor);

// An option of a parameter group as a number or a truth value, converted as Python does it.
double number_in(pybind11::handle group, const char* key);
bool truth_in(pybind11::handle group, const char* key);

// Whether the parameter has a gradient of any kind, even one that only torch's own path handles.
bool has_gradient(pybind11::handle param);

// Sets the parameters' gradients to None.
void clear_gradients(const pybind11::list& params);

}  // namespace fastnn::python
