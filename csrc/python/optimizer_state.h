// An optimizer's state, options and gradients, read straight from Python's objects: a list of
// tensors boxed at each call would cost more than the work. Nothing here knows which optimizer it
// is.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastnn::python {

// The optimizer's state, read in the order of its entries. Usually that is the order of the
// parameters, and a pointer's comparison finds each: a tensor's hash is a Python function, which
// costs more than the step of a small parameter.
class StateReader {
 public:
  explicit StateReader(const pybind11::dict& state);

  // What is stored for the parameter under `key`; None where there is nothing yet.
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

// A number, and a truth, of a parameter group, as Python takes its value for one.
double number_in(pybind11::handle group, const char* key);
bool truth_in(pybind11::handle group, const char* key);

// Whether it has a gradient, of whatever kind: for torch's own path, and its errors.
bool has_gradient(pybind11::handle param);

// Sets the parameters' gradients to None.
void clear_gradients(const pybind11::list& params);

}  // namespace fastnn::python
